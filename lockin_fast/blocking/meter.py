"""Running means of a training run's loss terms, kept on the device and read once a logging step."""

import torch
from torch import Tensor

FIELDS = ("sft_loss", "block_penalty", "active", "pairs")


class LossMeter:
    """Sums over micro-batches of sft_loss, block_penalty, active pairs and penalised pairs, as fp64 [4] on the device.

    The two losses arrive divided as the trainer divides them, so that the sum over one optimiser step is that step's
    value; `share` is the micro-batch's part of an optimiser step, and the shares add up to the number of steps.
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self._sums: Tensor | None = None
        self._steps = 0.0

    def add(self, sft_loss: Tensor, block_penalty=0.0, active=0, pairs=0, *, share: float) -> None:
        """Add one micro-batch. The values are tensors on the loss' device, or numbers; nothing is read back."""
        values = torch.zeros(len(FIELDS), dtype=torch.float64, device=sft_loss.device)
        for i, value in enumerate((sft_loss, block_penalty, active, pairs)):
            values[i] = value.detach() if isinstance(value, Tensor) else value
        self._sums = values if self._sums is None else self._sums.add_(values)
        self._steps += share

    def drain(self, gather=None) -> dict[str, float]:
        """Means since the last call: sft_loss, block_penalty a step, active_fraction of pairs. Empty if none came.

        One synchronisation. gather: Tensor [4] -> Tensor [ranks, 4], with several processes.
        """
        if self._sums is None:
            return {}
        sums = self._sums[None] if gather is None else gather(self._sums[None])
        ranks, steps = len(sums), max(round(self._steps), 1)
        sft_loss, penalty, active, pairs = sums.sum(0).tolist()
        self.reset()
        return {
            "sft_loss": sft_loss / ranks / steps,
            "block_penalty": penalty / ranks / steps,
            "active_fraction": active / pairs if pairs else 0.0,
        }
