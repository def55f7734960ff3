"""Running means of a training run's loss terms, kept on the device and read once a logging step."""

from collections.abc import Mapping

import torch
from torch import Tensor


class LossMeter:
    """Sums over micro-batches of sft_loss, the `columns`, active pairs and penalised pairs, as fp64 on the device.

    The losses arrive divided as the trainer divides them, so that the sum over one optimiser step is that step's value;
    `share` is the micro-batch's part of an optimiser step, and the shares add up to the number of steps.
    """

    def __init__(self, columns: tuple[str, ...] = ()):
        self._columns = ("sft_loss", *columns)
        self.reset()

    def reset(self) -> None:
        self._sums: Tensor | None = None
        self._steps = 0.0

    def add(self, losses: Mapping[str, Tensor], active=0, pairs=0, *, share: float) -> None:
        """Add one micro-batch. The values are tensors, or numbers but for sft_loss; nothing is read back."""
        values = torch.zeros(len(self._columns) + 2, dtype=torch.float64, device=losses["sft_loss"].device)
        for i, value in enumerate((*(losses[name] for name in self._columns), active, pairs)):
            values[i] = value.detach() if isinstance(value, Tensor) else value
        self._sums = values if self._sums is None else self._sums.add_(values)
        self._steps += share

    def state(self) -> tuple[Tensor | None, float]:
        """What `restore` goes on from: the sums since the last row, None where nothing came, and the steps."""
        return self._sums, self._steps

    def restore(self, sums: Tensor | None, steps: float) -> None:
        """Go on from what `state` gave."""
        self._sums, self._steps = sums, steps

    def drain(self, gather=None) -> dict[str, float]:
        """Means since the last call: each loss a step, active_fraction of pairs if any. Empty if nothing came.

        One synchronisation. gather: Tensor [n] -> Tensor [ranks, n], with several processes.
        """
        if self._sums is None:
            return {}
        sums = self._sums[None] if gather is None else gather(self._sums[None])
        ranks, steps = len(sums), max(round(self._steps), 1)
        *losses, active, pairs = sums.sum(0).tolist()
        self.reset()
        means = {name: loss / ranks / steps for name, loss in zip(self._columns, losses, strict=True)}
        return means | ({"active_fraction": active / pairs} if pairs else {})
