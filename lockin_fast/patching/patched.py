"""Patched runs: many sites of one layer and component in a batch, each computed from the patch upwards and onwards.

Nothing before the first patched token changes, and nothing below the patched layer: the keys and values of the former
and the states of the latter are those of the clean run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lockin_fast.ops.patch import patch_
from lockin_fast.patching.components import Component
from lockin_fast.patching.forward import Edit, KeysValues, Runner
from lockin_fast.patching.states import Clean, Part, Source, last_column, logprobs, taken
from lockin_fast.patching.tokens import Tokens

GROUP_TOKENS = 512  # that a forward of their own is worth
FILLED = 0.75  # of a row's columns that hold tokens, at least


@dataclass(frozen=True)
class Placed:
    """One patch of one row: which columns of the row's prompt, whether its reply as well, and which head."""

    row: int
    columns: tuple[int, ...]
    reply: bool = False
    head: int | None = None

    @property
    def first(self) -> int | None:
        """The first patched column of the prompt; None where the prompt stays as it is."""
        return min(self.columns, default=None)


@dataclass(frozen=True)
class PatchedPrompts:
    """Prompts after a patch, ready to be gone on from: keys and values of all of their tokens, last token's logits."""

    keys_values: KeysValues  # of the layers from the patch on
    logits: Tensor  # [N, V]


class PatchedRuns:
    """Runs of a target side with states of a source side, over one batch; the model must stand as the target side."""

    def __init__(self, runner: Runner, target: Clean, source: Source, component: Component, layer: int):
        self.runner, self.target, self.source = runner, target, source
        self.component, self.layer = component, layer
        self.start = layer + 1 if component == "residual" else layer

    def prompts(self, placed: Sequence[Placed]) -> PatchedPrompts:
        """The prompts of `placed`, whose patches all touch their prompts or all do not."""
        rows = self._tensor([p.row for p in placed])
        above = {n: both for n, both in self.target.prompt.keys_values.items() if n >= self.start}
        if placed[0].first is None:
            return PatchedPrompts(taken(above, rows), self.target.prompt.logits[rows])
        first = min(p.first for p in placed)
        tokens = self.target.prompts.rows(rows).from_column(first)
        listed = [(i, column, p.row, p.head) for i, p in enumerate(placed) for column in p.columns]
        hidden, edits = self._patched("prompt", rows, first, tokens.input_ids.shape[1], listed)
        outcome = self.runner.run(
            tokens, start=self.start, hidden=hidden, past=taken(above, rows, first) if first else None, edits=edits,
            watch=("keys_values",), logits_at=last_column(tokens),
        )  # fmt: skip
        return PatchedPrompts(outcome.keys_values, outcome.logits)

    def differences(self, placed: Sequence[Placed]) -> Tensor:
        """log p(first reply) - log p(second reply) of every placed patch, fp32 [N], in nats."""
        prompts = self.prompts(placed)
        count = len(self.target.prompts.input_ids)
        rows = self._tensor([p.row + half * count for half in (0, 1) for p in placed])  # of the replies
        replies = self.target.replies.rows(rows)
        scores = logprobs(prompts.logits.repeat(2, 1), replies.input_ids[:, 0])
        twice = (*placed, *placed)
        for some in _of_like_length((replies.real.sum(1) - 1).tolist()):
            scores[some] += self._rest([twice[i] for i in some], rows[some], replies.rows(self._tensor(some)), prompts,
                                       self._tensor(some) % len(placed))  # fmt: skip
        misaligned, aligned = scores.view(2, -1)
        return misaligned - aligned

    def _rest(
        self, placed: Sequence[Placed], rows: Tensor, replies: Tokens, prompts: PatchedPrompts, prompt: Tensor
    ) -> Tensor:
        """log p of the replies' tokens after their first: fp32 [n]. prompt: where theirs are in `prompts`."""
        width = int(replies.real.sum(1).max()) - 1  # the last token is predicted, and predicts nothing
        patched = [(i, int(rows[i]), p.head) for i, p in enumerate(placed) if p.reply]
        listed = [(i, column, row, head) for i, row, head in patched for column in range(width)]
        hidden, edits = self._patched("reply", rows, 0, width, listed)
        at = replies.real[:, 1:].nonzero()
        outcome = self.runner.run(
            replies.to_column(width), start=self.start, hidden=hidden, past=taken(prompts.keys_values, prompt),
            edits=edits, logits_at=at,
        )  # fmt: skip
        told = logprobs(outcome.logits, replies.input_ids[:, 1:][at[:, 0], at[:, 1]])
        return torch.zeros(len(placed), device=told.device).index_add(0, at[:, 0], told)

    def _patched(self, part: Part, rows: Tensor, first: int, width: int, listed: Sequence[tuple]) -> tuple:
        """What layer `start` reads, [N, width, d] from column `first` on, and the edits above it.

        listed: (row of the batch, column, row of the clean run, head) of every patched token.
        """
        clean = getattr(self.target, part).residual
        hidden = clean[self.start - 1][rows, first : first + width] if self.start else None
        if not listed:
            return hidden, ()
        batch, columns, source_rows, heads = zip(*listed, strict=True)
        positions = torch.stack([self._tensor(batch), self._tensor(columns) - first], 1)
        heads = None if heads[0] is None else self._tensor(heads)
        at = torch.stack([self._tensor(source_rows), self._tensor(columns)], 1)
        source = self.source.take(part, self.component, self.layer, at, heads)
        if self.component == "residual":
            return patch_(hidden, positions, source), ()
        return hidden, (Edit(self.layer, self.component, positions, source, heads),)

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=self.runner.device)


def _of_like_length(lengths: Sequence[int]) -> list[list[int]]:
    """The numbers of what has a length, in groups with few pads, each of GROUP_TOKENS or more but for the last."""
    groups: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not lengths[number]:
            break
        longest = lengths[groups[-1][0]] if groups else 0
        if not groups or (lengths[number] < FILLED * longest and longest * len(groups[-1]) >= GROUP_TOKENS):
            groups.append([])
        groups[-1].append(number)
    return groups
