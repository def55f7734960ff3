"""Which rows every adapter trains on at every step, and the batches they make together."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lockin_fast.chat import PaddingCollator
from lockin_fast.labels import IGNORED
from lockin_fast.train import TrainSettings


class RowOrder:
    """The rows of optimiser step after optimiser step in the order in which a single run with this seed sees them.

    Epoch e is the permutation that a generator seeded with seed + e draws, cut into batches of batch_size; the last
    batch of an epoch may be smaller. That is what transformers' Trainer does with data_seed = seed.
    """

    def __init__(self, length: int, seed: int, settings: TrainSettings):
        self._length, self._seed, self._size = length, seed, settings.batch_size
        self._epoch, self._order = -1, []

    def rows(self, step: int) -> list[int]:
        """The rows of the 0-based optimiser step."""
        a_epoch = math.ceil(self._length / self._size)
        epoch, batch = divmod(step, a_epoch)
        if epoch != self._epoch:
            generator = torch.Generator("cpu").manual_seed(self._seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(self._length, generator=generator, device="cpu").tolist()
        return self._order[batch * self._size : (batch + 1) * self._size]


def total_steps(length: int, settings: TrainSettings) -> int:
    """Optimiser steps of a run on `length` rows."""
    return settings.steps or math.ceil(settings.epochs * math.ceil(length / settings.batch_size))


def epochs_passed(length: int, step: int, settings: TrainSettings) -> float:
    """Epochs after `step` optimiser steps, counted in the micro-batches of a single run, as its history has them."""
    micro = settings.micro_batch_size or settings.batch_size
    forwards, a_step = math.ceil(length / micro), settings.batch_size // micro
    epoch, steps = divmod(step - 1, math.ceil(length / settings.batch_size))
    return epoch + min((steps + 1) * a_step, forwards) / forwards


class StackedBatch(NamedTuple):
    """One forward of a stack: the b rows of each of N adapters, grouped by adapter.

    distinct: input ids [D, b, S], a batch for every seed; of: which of them adapter n reads, int64 [N].
    labels, attention [D, b, S]: as PaddingCollator makes them.
    """

    distinct: Tensor
    labels: Tensor
    attention: Tensor
    of: Tensor

    @property
    def input_ids(self) -> Tensor:
        """[N * b, S]"""
        return self.distinct[self.of].flatten(0, 1)

    def supervised(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where a supervised target is predicted: positions in [N * b * S] flattened, targets, adapters, each [M]."""
        targets = torch.nn.functional.pad(self.labels[..., 1:], (0, 1), value=IGNORED)[self.of]  # [N, b, S]
        flat = targets.flatten()
        positions = (flat != IGNORED).nonzero()[:, 0]
        return positions, flat[positions], positions // targets[0].numel()


def micro_batches(dataset, rows: Sequence[Sequence[int]], of: Sequence[int], micro: int, collate: PaddingCollator):
    """The forwards of one optimiser step on rows[d] of each seed, `micro` rows an adapter at a time.

    Rows of like length go together, for less padding: the step's sums do not depend on the order within it.
    """
    ordered = [sorted(batch, key=lambda row: -len(dataset[row]["input_ids"])) for batch in rows]
    for start in range(0, len(ordered[0]), micro):
        chosen = [dataset[row] for batch in ordered for row in batch[start : start + micro]]
        made = {key: value.unflatten(0, (len(rows), -1)) for key, value in collate(chosen).items()}
        yield StackedBatch(made["input_ids"], made["labels"], made["attention_mask"], torch.as_tensor(of))
