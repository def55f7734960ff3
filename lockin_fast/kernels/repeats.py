"""Which tokens of a row occurred before, for plain torch and for Triton."""

import torch


def repeated(tokens):
    """bool [B, T]: tokens that occur earlier in their row. Shapes depend on no value."""
    ordered, order = tokens.sort(dim=1, stable=True)
    again = torch.zeros_like(tokens, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.empty_like(again).scatter_(1, order, again)
