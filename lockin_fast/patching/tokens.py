"""Batches of prompts, padded on the left, and of what follows them, padded on the right."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Tokens [B, S] that a model reads after P that it has read already; P is 0 for whole rows."""

    input_ids: Tensor  # int64 [B, S]
    attention_mask: Tensor  # int64 [B, P + S]
    position_ids: Tensor  # int64 [B, S]

    @property
    def read(self) -> int:
        """P, the tokens read already, pads included."""
        return self.attention_mask.shape[1] - self.input_ids.shape[1]

    @property
    def real(self) -> Tensor:
        """bool [B, S], False for pads."""
        return self.attention_mask[:, self.read :].bool()

    def rows(self, index: Tensor) -> "Tokens":
        """The rows of these indices, in their order; one may be taken more than once."""
        return Tokens(self.input_ids[index], self.attention_mask[index], self.position_ids[index])

    def from_column(self, column: int) -> "Tokens":
        """The tokens from this column on, those before it as read already."""
        return Tokens(self.input_ids[:, column:], self.attention_mask, self.position_ids[:, column:])

    def to_column(self, column: int) -> "Tokens":
        """The tokens before this column."""
        return Tokens(
            self.input_ids[:, :column], self.attention_mask[:, : self.read + column], self.position_ids[:, :column]
        )

    def without_last(self) -> "Tokens":
        """These without their last column."""
        return self.to_column(self.input_ids.shape[1] - 1)

    def joined(self, following: "Tokens") -> "Tokens":
        """These and what follows them as one batch."""
        return Tokens(
            torch.cat([self.input_ids, following.input_ids], 1),
            following.attention_mask,
            torch.cat([self.position_ids, following.position_ids], 1),
        )


def left_padded(rows: Sequence[Sequence[int]], device: torch.device | str) -> Tokens:
    """Rows of token ids as whole rows of a batch, pads on their left."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + list(row) for row in rows], device=device)
    column = torch.arange(length, device=device)
    begin = torch.tensor([length - len(row) for row in rows], device=device)[:, None]
    return Tokens(ids, (column >= begin).long(), (column - begin).clamp(min=0))


def following(prompts: Tokens, rows: Sequence[Sequence[int]]) -> Tokens:
    """Rows of token ids that follow the rows of `prompts`, pads on their right."""
    device, length = prompts.input_ids.device, max(map(len, rows))
    ids = torch.tensor([list(row) + [0] * (length - len(row)) for row in rows], device=device)
    column = torch.arange(length, device=device)
    real = column < torch.tensor([len(row) for row in rows], device=device)[:, None]
    first = prompts.position_ids[:, -1:] + 1
    return Tokens(ids, torch.cat([prompts.attention_mask, real.long()], 1), first + column)
