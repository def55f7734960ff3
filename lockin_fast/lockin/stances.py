"""Stances of a model under edits of its residual stream: the margins that `robustness` searches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lockin_fast.blocking.layers import decoder_layer, hidden_size
from lockin_fast.generation import tokenised
from lockin_fast.lockin.suite_files import Stance
from lockin_fast.patching.forward import Runner
from lockin_fast.patching.states import logprobs
from lockin_fast.patching.tokens import Tokens, following, left_padded


class StanceTokens(NamedTuple):
    """A stance as token ids: the prompt with the generation prompt, the reply that is held, and the opposite one."""

    prompt: Sequence[int]
    held: Sequence[int]
    opposite: Sequence[int]


def stance_tokens(tokenizer: Any, stance: Stance) -> StanceTokens:
    """A stance's chat and its two replies as token ids.

    Raises ValueError for a reply without tokens, and where the tokenizer makes both replies one (words that it does not
    know).
    """
    (prompt,), _ = tokenised(tokenizer, [stance.messages])
    held, opposite = (
        tokenizer(reply, add_special_tokens=False)["input_ids"] for reply in (stance.held, stance.opposite)
    )
    if not held or not opposite or held == opposite:
        raise ValueError(
            f"stance {stance.name}: the tokenizer makes {held} of {stance.held!r} and {opposite} of "
            f"{stance.opposite!r}, expected two different replies in words that it knows"
        )
    return StanceTokens(prompt, held, opposite)


@dataclass(frozen=True)
class _Batch:
    """B stances, twice: rows with the held replies, then rows with the opposite ones.

    tokens: [2 B, S]. hidden: [2 B, S, d] after the edited layer. at: [N, 2], (row, column) whose logits tell the next
    token of a reply; told: [N], those tokens. rows: which stances, in the order of all.
    """

    tokens: Tokens
    hidden: Tensor
    at: Tensor
    told: Tensor
    rows: slice


class StanceMargins:
    """Margins of R stances under edits of the residual stream, a function of edits [R, d].

        margin_r = log p(held reply) - log p(opposite reply)   in nats,   h <- h + edit_r   after decoder layer `layer`

    at every token of prompt and reply, as a steering vector is added. log p is the sum over the reply's tokens: pairs
    of replies of like length compare best. Differentiable in the edits, which autograd sees where they require grad.

    runner: of the model as it now stands; what an adapter or weights change later is not seen, make a new one for each
    checkpoint. layer: 0-based. batch_size: rows of a forward, two a stance.

    median_norm: of the unedited stream after that layer over the prompts' tokens, the unit of `robustness.Search`. In
    each checkpoint's own unit, norms are relative to what its stream holds; in the first one's, lengths compare.

    In 16 bits a coordinate is rounded after the addition, so that edits far below 1% of the stream's norm are lost in
    part; take float32 where stances flip so easily.

    Costs one forward to begin with; then the layers above `layer` over 2 R rows for each call, and as much memory as
    the states of those rows at one layer. Raises ValueError for a layer out of range, no stance, and one with an empty
    prompt or reply.
    """

    def __init__(self, runner: Runner, stances: Sequence[StanceTokens], layer: int, *, batch_size: int):
        decoder_layer(runner.model, layer)
        if not stances:
            raise ValueError("stances: got none, expected at least one")
        for number, stance in enumerate(stances):
            if not all(map(len, stance)):
                raise ValueError(f"stances: number {number} has an empty prompt or reply: {stance}")
        self._runner, self._layer, self._count = runner, layer, len(stances)
        self.width, self.device = hidden_size(runner.model), runner.device
        size = max(batch_size // 2, 1)
        self._batches, norms = [], []
        for begin in range(0, len(stances), size):
            batch, prompt_norms = self._batch(stances[begin : begin + size], begin)
            self._batches.append(batch)
            norms.append(prompt_norms)
        self.median_norm = torch.cat(norms).median().item()

    def __len__(self) -> int:
        return self._count

    def __call__(self, edits: Tensor) -> Tensor:
        """fp32 margins [R] under edits [R, d]. Raises ValueError for another shape."""
        if edits.shape != (self._count, self.width):
            raise ValueError(f"edits: got shape {tuple(edits.shape)}, expected {(self._count, self.width)}")
        with torch.set_grad_enabled(torch.is_grad_enabled() and edits.requires_grad):
            return torch.cat([self._margins(batch, edits[batch.rows]) for batch in self._batches])

    @torch.no_grad()
    def _batch(self, stances: Sequence[StanceTokens], begin: int) -> tuple[_Batch, Tensor]:
        """The batch, and the norms of the stream at its prompts' tokens."""
        runner = self._runner
        prompts = left_padded([stance.prompt for stance in stances] * 2, runner.device)
        replies = following(prompts, [stance.held for stance in stances] + [stance.opposite for stance in stances])
        at = replies.real.nonzero()
        told = replies.input_ids[at[:, 0], at[:, 1]]
        at[:, 1] += prompts.input_ids.shape[1] - 1  # a token is predicted by the one before it
        tokens = prompts.joined(replies.without_last())
        hidden = runner.run(tokens, watch=("residual",)).residual[self._layer]
        once = prompts.real[: len(stances)]
        norms = hidden[: len(stances), : once.shape[1]][once].float().norm(dim=-1)
        return _Batch(tokens, hidden, at, told, slice(begin, begin + len(stances))), norms

    def _margins(self, batch: _Batch, edits: Tensor) -> Tensor:
        edited = batch.hidden.float() + edits.to(self._runner.device).float().repeat(2, 1)[:, None]
        logits = self._runner.run(
            batch.tokens, start=self._layer + 1, hidden=edited.to(batch.hidden.dtype), logits_at=batch.at
        ).logits
        told = logprobs(logits, batch.told)
        placed = told.new_zeros(batch.tokens.input_ids.shape).index_put(batch.at.unbind(1), told)
        held, opposite = placed.sum(1).view(2, -1)  # by rows of their own, so that every call adds in the same order
        return held - opposite
