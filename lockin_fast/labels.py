"""What the labels of a batch say: which tokens are supervised, and how many targets a loss counts."""

import torch
from torch import Tensor

IGNORED = -100  # the label of a token that is not supervised


def penalised(tokens: str, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Which tokens a penalty counts, bool, the shape of `labels`.

    tokens: "supervised", those whose own label is not -100; "all", those that the attention mask keeps, or every one
    where there is none (padding-free batches).
    """
    if tokens == "supervised":
        return labels != IGNORED
    return torch.ones_like(labels, dtype=torch.bool) if attention_mask is None else attention_mask.bool()


def targets(labels: Tensor) -> Tensor:
    """Which of the tokens [..., 1:] are targets of a language model's loss: supervised, and predicted by another."""
    return labels[..., 1:] != IGNORED
