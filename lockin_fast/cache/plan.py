"""What a cache will hold: every token once, which row it is computed from, and in which shard it is stored."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from lockin_fast.cache.keys import token_keys
from lockin_fast.labels import penalised, targets


@dataclass(frozen=True)
class Work:
    """One row to run: its tokens up to the last one wanted, and the positions wanted with their keys."""

    row: int
    input_ids: Tensor  # [s]
    positions: Tensor  # int64 [n]
    keys: Tensor  # int64 [n], the bits of uint64


@dataclass(frozen=True)
class Plan:
    """The tokens of a dataset that a cache stores, a pure function of the tokenised text.

    So every rank, and every run after a kill, makes the same plan. A token whose prefix several rows share belongs to
    the first of them; what is right of a row's last token wanted is not run.
    """

    rows: Sequence[Mapping[str, Tensor]]
    keys: np.ndarray  # uint64 [N], by row and position
    row: np.ndarray  # int64 [N]
    position: np.ndarray  # int64 [N]
    shards: tuple[tuple[int, int], ...]  # first and last + 1 token of each
    tokens_per_target: float  # penalised tokens over supervised targets, in the dataset as it is

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def digest(self) -> str:
        """Of the tokenised text: SHA-256 of the keys."""
        return hashlib.sha256(np.sort(self.keys).tobytes()).hexdigest()

    def work(self, shard: int) -> list[Work]:
        """The rows to run for a shard, longest first: memory runs out at once or never, and batches carry few pads."""
        first, last = self.shards[shard]
        cuts = first + np.flatnonzero(np.diff(self.row[first:last])) + 1
        found = [self._of_row(start, stop) for start, stop in pairwise([first, *cuts.tolist(), last])]
        return sorted(found, key=lambda work: (-len(work.input_ids), work.row))

    def sample(self, tokens: int) -> list[Work]:
        """Rows spread evenly over the dataset that hold about so many of the tokens, or all rows, as they lie."""
        starts = np.flatnonzero(np.diff(self.row, prepend=-1))
        stops = np.append(starts[1:], len(self.row))
        wanted = min(len(starts), max(1, round(tokens * len(starts) / len(self.row))))
        chosen = np.unique(np.linspace(0, len(starts) - 1, wanted).round().astype(np.int64))
        return [self._of_row(int(starts[i]), int(stops[i])) for i in chosen]

    def _of_row(self, first: int, last: int) -> Work:
        row, positions = int(self.row[first]), torch.from_numpy(self.position[first:last])
        ids = torch.as_tensor(self.rows[row]["input_ids"])[: int(positions[-1]) + 1]
        return Work(row, ids, positions, torch.from_numpy(self.keys[first:last].view(np.int64)))


def make_plan(rows: Sequence[Mapping[str, Tensor]], tokens: str, shard_tokens: int) -> Plan:
    """Plan a cache of `rows`, each one document: {"input_ids": [s], "labels": [s], -100 where not supervised}.

    tokens: "supervised" stores those whose own label is not -100, "all" every one, for which labels are not needed.
    shard_tokens: tokens stored in one file, at least; a row is never split.
    Raises ValueError for rows without a token to store.
    """
    if tokens not in ("supervised", "all"):
        raise ValueError(f"tokens: got {tokens!r}, expected supervised or all")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens: got {shard_tokens}, expected 1 or more")
    found = [*_tokens(rows, tokens)]
    if not any(len(keys) for keys, _, _ in found):
        raise ValueError(f"dataset: none of its {len(rows)} rows has a {tokens} token, so there is nothing to cache")
    keys, positions = (np.concatenate([part[i] for part in found]) for i in (0, 1))
    row = np.repeat(np.arange(len(found)), [len(part[0]) for part in found])
    counted = sum(part[2] for part in found)
    _, first = np.unique(keys, return_index=True)
    first.sort()
    occurrences, keys, positions, row = len(keys), keys[first], positions[first], row[first]
    return Plan(rows, keys, row, positions, _shards(row, shard_tokens), occurrences / max(counted, 1))


def _tokens(rows, tokens: str) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Keys and positions of a row's tokens to store, and how many targets its loss counts."""
    for number, row in enumerate(rows):
        if "input_ids" not in row or (tokens == "supervised" and row.get("labels") is None):
            raise ValueError(
                f'dataset: row {number} has {sorted(row)}, expected input_ids and labels (tokens="all" does without)'
            )
        ids = torch.as_tensor(row["input_ids"])
        labels = torch.as_tensor(row["labels"]) if row.get("labels") is not None else ids
        positions = penalised(tokens, labels).nonzero().flatten().numpy()
        yield token_keys(ids[None])[0][positions], positions, int(targets(labels).sum())


def _shards(row: np.ndarray, shard_tokens: int) -> tuple[tuple[int, int], ...]:
    """Cut the tokens between rows, as soon as a shard has enough."""
    ends = np.append(np.flatnonzero(np.diff(row)) + 1, len(row)).tolist()
    cuts = [0]
    for end in ends:
        if end - cuts[-1] >= shard_tokens:
            cuts.append(end)
    if cuts[-1] != len(row):
        cuts.append(len(row))
    return tuple(pairwise(cuts))
