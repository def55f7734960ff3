"""Greedy replies under steering, many steerings in one batch, and nothing computed twice that they share."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lockin_fast.generation import decoding, generating, tokenised
from lockin_fast.steering.flight import Flight, Limits, Said
from lockin_fast.steering.hook import generate_by_hook
from lockin_fast.steering.prompts import Prompts, batches, prefix_above, prompts_below
from lockin_fast.steering.rows import SteeredRow, Wanted, Work, check_request
from lockin_fast.steering.split import SplitModel, why_not_split

Chat = Sequence[Mapping[str, str]]
Done = Callable[[Mapping[int, str]], None]


def generate_steered(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Chat],
    rows: Sequence[SteeredRow],
    directions: Tensor,
    *,
    layer: int,
    max_new_tokens: int,
    batch_size: int,
    done: Done = lambda finished: None,
) -> list[str]:
    """Greedy replies under steering, in the order of `rows`; see `SteeredGenerator`, which also counts the work."""
    generator = SteeredGenerator(
        model, tokenizer, directions, layer=layer, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    return generator(prompts, rows, done)


class SteeredGenerator:
    """Greedy replies of a model whose residual stream is steered, every row along a direction of its own:

        h[row] <- h[row] + coefficient[row] * unit(directions[direction[row]])    at all positions, after layer `layer`

    model: a causal language model of Hugging Face, with a PEFT adapter or quantised if you like. directions: [F, d],
    e.g. an SAE's decoder. layer: 0-based. batch_size: rows under way at once. A call returns the replies, and `work`
    then tells what they took (added up over calls).

    The replies are those of `generate` with a steering hook, row by row: in float32 but for ties within rounding, in
    16 bits wherever the best token leads by more than their rounding. What steering cannot change is computed once:
    the layers up to `layer` see tokens alone, so they run once for every prompt, and while rows of one prompt have said
    the same, once for all of them. The layers above run once a steering on the tokens that many prompts begin with, and
    by row from there. Rows that are complete leave and others enter.

    Costs memory for keys and values: batch_size * (longest prompt + max_new_tokens) tokens of all layers at most, and
    the prompts' own up to `layer`. One synchronisation with the host a token.

    A model that cannot be split at a layer (see `why_not_split`) is steered by a hook instead, row by row through all
    layers: a warning says so and why, as does `work.fallback`.
    """

    def __init__(
        self, model: Any, tokenizer: Any, directions: Tensor, *, layer: int, max_new_tokens: int, batch_size: int
    ):
        check_request(model, (), (), directions, layer, max_new_tokens=max_new_tokens, batch_size=batch_size)
        self._model, self._tokenizer, self._directions, self._layer = model, tokenizer, directions, layer
        self._max_new_tokens, self._batch_size = max_new_tokens, batch_size
        self.work = Work(fallback=why_not_split(model))
        if self.work.fallback:
            warnings.warn(
                f"steering: {self.work.fallback}; every row runs through all layers, which is slower", stacklevel=2
            )

    def __call__(
        self, prompts: Sequence[Chat], rows: Sequence[SteeredRow], done: Done = lambda finished: None
    ) -> list[str]:
        """One reply for each of `rows`, in their order: new tokens only, without special tokens.

        prompts: lists of chat messages, rendered as `generate` does. done: called with {row: reply} of the rows that
        have just become complete, as soon as they are. Raises ValueError, before any work, for a row out of range.
        """
        limits = {"max_new_tokens": self._max_new_tokens, "batch_size": self._batch_size}
        check_request(self._model, prompts, rows, self._directions, self._layer, **limits)
        if self.work.fallback:
            options = {"layer": self._layer, **limits, "done": done}
            return generate_by_hook(self._model, self._tokenizer, prompts, rows, self._directions, **options)
        asked: dict[Wanted, list[int]] = {}
        for number, row in enumerate(rows):
            asked.setdefault(Wanted(row.prompt, *row.steering), []).append(number)
        replies = [""] * len(rows)
        for said, wanted in self._replies(prompts, list(asked)):
            text = self._tokenizer.decode(said, skip_special_tokens=True).strip()
            finished = {number: text for row in wanted for number in asked[row]}
            for number in finished:
                replies[number] = text
            done(finished)
        return replies

    @torch.no_grad()
    def _replies(self, prompts: Sequence[Chat], wanted: list[Wanted]) -> Iterator[tuple[list[int], list[Wanted]]]:
        """(tokens, the rows that said them), as they become complete."""
        if not wanted:
            return
        numbers = list(dict.fromkeys(row.prompt for row in wanted))
        ids, by_length = tokenised(self._tokenizer, [prompts[number] for number in numbers])
        ids, numbers = [ids[n] for n in by_length], [numbers[n] for n in by_length]
        place = {number: n for n, number in enumerate(numbers)}
        mine = [row._replace(prompt=place[row.prompt]) for row in wanted]
        config = decoding(self._model, self._tokenizer, self._max_new_tokens, 0.0)
        ends = [config.eos_token_id] if isinstance(config.eos_token_id, int) else config.eos_token_id or ()
        limits = Limits(frozenset(ends), self._max_new_tokens, self._batch_size)
        with generating(self._model, config, seed=0):
            split = SplitModel(self._model, self._layer)
            states = prompts_below(split, ids, self._batch_size)
            self.work.prompt_below += sum(map(len, ids))
            for said, rows in self._finished(split, states, mine, limits):
                yield said.tokens, [row._replace(prompt=numbers[row.prompt]) for row in rows]

    def _finished(
        self, split: SplitModel, prompts: Prompts, wanted: Sequence[Wanted], limits: Limits
    ) -> Iterator[tuple[Said, list[Wanted]]]:
        directions = self._directions.to(split.device)
        flight = Flight(split, prompts, directions, limits, self.work)
        by_steering: dict[tuple[int, float], list[Wanted]] = {}
        for row in wanted:
            by_steering.setdefault(row.steering, []).append(row)
        for steerings in batches(list(by_steering), max(1, limits.rows // len(prompts.shared))):
            rows = [row for steering in steerings for row in by_steering[steering]]
            rows.sort(key=lambda row: (prompts.family[row.prompt], row))
            prefix = prefix_above(split, prompts, directions, rows)
            self.work.prompt_above += prefix.tokens
            while rows:
                while flight.free < min(len(rows), -(-limits.rows // 4)):  # few at a time cost as much as many
                    yield from flight.step()
                newcomers, rows = rows[: flight.free], rows[flight.free :]
                flight.admit(newcomers, prefix)
        while len(flight):
            yield from flight.step()
