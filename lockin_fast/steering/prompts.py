"""Prompts as the layers below the steering leave them, and what steered rows share of them above it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from lockin_fast.ops.steer import steer_
from lockin_fast.steering.key_values import KeyValues
from lockin_fast.steering.rows import Wanted
from lockin_fast.steering.split import SplitModel

FAMILY_SAVES = 0.2  # a family more has to save this share of the tokens: its rows are read in a forward of their own


@dataclass
class Prompts:
    """Prompts, longest first, as the layers below leave them.

    hidden, cache: states [P, longest, d], and keys and values, of those layers by position. family: the number of the
    family of each prompt; prompts of a family begin with the same `shared[family]` tokens, fewer than the shortest has.
    """

    ids: Sequence[list[int]]
    hidden: Tensor
    cache: KeyValues
    family: list[int] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.family = [0] * len(self.ids)
        for number, members in enumerate(families(self.ids)):
            self.shared.append(common_beginning([self.ids[n] for n in members]))
            for n in members:
                self.family[n] = number


@dataclass(frozen=True)
class Prefix:
    """Keys and values of the layers above for what families share, a slot for a family under a steering."""

    cache: KeyValues
    slot: Mapping[tuple[int, int, float], int]
    tokens: int


def prompts_below(split: SplitModel, ids: Sequence[list[int]], at_once: int) -> Prompts:
    """Run prompts, longest first, through the layers below. Padding stands on the right, where nothing reads it."""
    cache, hidden = KeyValues(len(ids), len(ids[0])), None
    for numbers in batches(range(len(ids)), at_once):
        longest = len(ids[numbers[0]])
        slots = slice(numbers[0], numbers[-1] + 1)
        batch = torch.tensor([[*ids[n], *[0] * (longest - len(ids[n]))] for n in numbers], device=split.device)
        positions = torch.arange(longest, device=split.device)[None]
        found = split.below(batch, positions, cache.write_next(slots, 0, longest))
        if hidden is None:
            hidden = found.new_zeros(len(ids), longest, found.shape[2])
        hidden[slots, :longest] = found
    return Prompts(ids, hidden, cache)


def prefix_above(split: SplitModel, prompts: Prompts, directions: Tensor, rows: Sequence[Wanted]) -> Prefix:
    """Run what the families of these rows share through the layers above, once for each of their steerings."""
    asked = sorted({(prompts.family[row.prompt], *row.steering) for row in rows})
    cache, tokens = KeyValues(len(asked), max(prompts.shared)), 0
    for family, alike in groupby(enumerate(asked), key=lambda item: item[1][0]):
        places, keys = zip(*alike, strict=True)
        shared = prompts.shared[family]
        if shared and not split.nothing_above:
            member = prompts.family.index(family)
            hidden = prompts.hidden[member, None, :shared].repeat(len(keys), 1, 1)
            steer_(hidden, directions, *steering_tensors([key[1:] for key in keys], split.device))
            fill(split, hidden, cache, slice(places[0], places[-1] + 1), 0)
            tokens += shared * len(keys)
    return Prefix(cache, {key: n for n, key in enumerate(asked)}, tokens)


def fill(split: SplitModel, hidden: Tensor, cache: KeyValues, slots: slice, start: int) -> None:
    """Write the keys and values of all layers above for steered states [n, S, d] at positions from `start` on."""
    end = start + hidden.shape[1]
    positions = torch.arange(start, end, device=hidden.device)[None]
    split.above(hidden, positions, cache.write_next(slots, start, end, stop_at=split.top))


def steering_tensors(steerings: Sequence[tuple[int, float]], device: torch.device) -> tuple[Tensor, Tensor]:
    """The index and the coefficient that `steer_` takes."""
    return (
        torch.tensor([direction for direction, _ in steerings], dtype=torch.int64, device=device),
        torch.tensor([coefficient for _, coefficient in steerings], dtype=torch.float32, device=device),
    )


def families(ids: Sequence[list[int]]) -> list[list[int]]:
    """Prompts put together so that few tokens are left to be read by row: all but the last of each, less the shared.

    A family splits where its members' ways part if that saves `FAMILY_SAVES` of them.
    """

    def least(members: list[int]) -> tuple[int, list[list[int]]]:
        shared = common_beginning([ids[n] for n in members])
        together = shared + sum(len(ids[n]) - 1 - shared for n in members)
        parts: dict[tuple[int, ...], list[int]] = {}
        for n in members:
            parts.setdefault(tuple(ids[n][: shared + 1]), []).append(n)
        if len(parts) == 1:
            return together, [members]
        costs, split = zip(*map(least, parts.values()), strict=True)
        if sum(costs) > (1 - FAMILY_SAVES) * together:
            return together, [members]
        return sum(costs), [family for found in split for family in found]

    return least(list(range(len(ids))))[1]


def common_beginning(ids: Sequence[list[int]]) -> int:
    """How many tokens all of `ids` begin with, at most all but the last of the shortest."""
    shortest = min(map(len, ids)) - 1
    return next((n for n in range(shortest) if len({row[n] for row in ids}) > 1), shortest)


def batches(items: Sequence, size: int) -> list[Sequence]:
    """The same items, at most `size` at a time."""
    return [items[start : start + size] for start in range(0, len(items), size)]
