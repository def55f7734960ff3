"""What the adapters of a stack log, a history row each, read from the device once a logging step."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lockin_fast.stacked.objective import Measures, Terms, columns_of


class StackedMeter:
    """Sums of the measures of N adapters since the last logging step: fp64 [columns + 2, N] on the device."""

    def __init__(self, terms: Sequence[Terms], device: torch.device):
        self._terms = list(terms)
        self.columns = (*columns_of(terms), "active", "pairs")
        self.sums = torch.zeros(len(self.columns), len(terms), dtype=torch.float64, device=device)
        self.steps = 0

    def add(self, measures: Measures) -> None:
        """Add one micro-batch; nothing is read back."""
        losses = [measures.losses[name] for name in self.columns[:-2]]
        self.sums += torch.stack([*losses, measures.active, measures.pairs])

    def drain(self, grad_norm: Tensor) -> list[dict[str, float]]:
        """One row an adapter, means over the steps since the last call, as `fine_tune` logs them. Synchronises once.

        grad_norm: of the last step [N], before clipping. Without terms a row has no keys of them.
        """
        values = torch.cat([self.sums, grad_norm.double()[None]]).T.tolist()
        rows = [self._row(*value, own) for value, own in zip(values, self._terms, strict=True)]
        self.sums.zero_()
        self.steps = 0
        return rows

    def _row(self, *values) -> dict[str, float]:
        *losses, active, pairs, norm, terms = values
        means = {name: loss / self.steps for name, loss in zip(self.columns, losses, strict=False)}
        means = {name: means[name] for name in dict.fromkeys(["sft_loss", *(term.column for term in terms)])}
        weights = {term.column: term.weight for term in terms}
        loss = sum(value * weights.get(name, 1.0) for name, value in means.items())
        means |= {"active_fraction": active / pairs} if pairs else {}
        return {"loss": loss, "grad_norm": norm} | means | {term.weight_column: term.weight for term in terms}


def not_finite(row: dict[str, float]) -> str | None:
    """The first of a history row's numbers that is not finite: a loss term, else the gradient's norm."""
    names = [name for name in row if name not in ("loss", "grad_norm")]
    return next((name for name in (*names, "grad_norm") if not math.isfinite(row[name])), None)
