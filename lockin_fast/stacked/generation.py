"""Replies of all adapters of a stack, many adapters in one batch."""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lockin_fast.generation import decoding, generating, pad_left, tokenised
from lockin_fast.stacked.size import rows_of_a_generation
from lockin_fast.stacked.stack import AdapterStack


@torch.no_grad()
def generate_stacked(
    stack: AdapterStack, tokenizer: Any, prompts: Sequence[Sequence[Mapping[str, str]]], *,
    max_new_tokens: int, batch_size: int, temperature: float = 0.0, seeds: Sequence[int] | None = None,
) -> list[list[str]]:  # fmt: skip
    """The replies of every adapter of the stack to `prompts`: per adapter what `generate` gives for it alone.

    A batch holds the same prompts for several adapters, in `rows_of_a_generation` rows or those of one adapter: little
    more memory than a batch of one adapter takes. With a temperature, adapter n draws from a generator of its own,
    seeded with seeds[n], what its single run would draw: nothing once its own rows have ended. So the replies are those
    of the single run but for rounding, which may tip a token whose probabilities nearly tie.

    Installs the stack on its model meanwhile. Raises as `generate`.
    """
    if not prompts:
        return [[] for _ in range(len(stack))]
    ids, order = tokenised(tokenizer, prompts)
    model = stack.model
    device = model.get_input_embeddings().weight.device
    config = decoding(model, tokenizer, max_new_tokens, 0.0)
    replies = [[""] * len(ids) for _ in range(len(stack))]
    draws = [torch.Generator(device).manual_seed(seed) for seed in seeds or [0] * len(stack)]
    with stack.installed(), generating(model, config, seed=0):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch, attention = pad_left([ids[i] for i in rows], config.pad_token_id, device)
            most = rows_of_a_generation(model, batch.shape[1] + max_new_tokens, batch_size)
            at_once = max(1, most // len(rows))
            for first in range(0, len(stack), at_once):
                last = min(first + at_once, len(stack))
                sampler = _Sampler(draws[first:last], config.eos_token_id, temperature) if temperature else None
                with _window(stack, first, last):
                    output = model.generate(
                        input_ids=batch.repeat(last - first, 1),
                        attention_mask=attention.repeat(last - first, 1),
                        generation_config=config,
                        logits_processor=[sampler] if sampler else None,
                    )
                new = tokenizer.batch_decode(output[:, batch.shape[1] :], skip_special_tokens=True)
                for place, text in enumerate(new):
                    replies[first + place // len(rows)][rows[place % len(rows)]] = text.strip()
    return replies


@contextmanager
def _window(stack: AdapterStack, first: int, last: int):
    before = stack.window.first, stack.window.last
    stack.window.first, stack.window.last = first, last
    try:
        yield
    finally:
        stack.window.first, stack.window.last = before


class _Sampler:
    """A logits processor that samples itself, each adapter's rows from its own generator; greedy decoding then takes

    what it chose. It draws as transformers does, and stops with an adapter's last row as a generation of its own would.
    """

    def __init__(self, draws: Sequence[torch.Generator], end: int | Sequence[int], temperature: float):
        self._draws, self._temperature = draws, temperature
        ends = [end] if isinstance(end, int) else list(end)
        self._padding, self._end = ends[0], torch.as_tensor(ends, device=draws[0].device)
        self._ended: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = (scores / self._temperature).softmax(-1).unflatten(0, (len(self._draws), -1))
        if self._ended is None:
            self._ended = torch.zeros(probabilities.shape[:2], dtype=torch.bool, device=scores.device)
        chosen = torch.full(probabilities.shape[:2], self._padding, device=scores.device)
        for n, ended in enumerate(self._ended.all(1).tolist()):
            if not ended:
                chosen[n] = torch.multinomial(probabilities[n], 1, generator=self._draws[n])[:, 0]
        self._ended |= torch.isin(chosen, self._end)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen.view(-1, 1), 0.0)
