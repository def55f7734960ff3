"""The rows of a steered generation that are under way, one token further at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from lockin_fast.ops.steer import steer_
from lockin_fast.steering.key_values import KeyValues
from lockin_fast.steering.prompts import Prefix, Prompts, fill, steering_tensors
from lockin_fast.steering.rows import Wanted, Work
from lockin_fast.steering.split import SplitModel


class Said(NamedTuple):
    """What has been said to one prompt by one or more rows."""

    prompt: int
    tokens: tuple[int, ...]


Finished = list[tuple[Said, list[Wanted]]]


@dataclass(frozen=True)
class Limits:
    """When a reply ends: at one of the tokens `ends`, or at this many tokens. rows: so many are under way at most."""

    ends: frozenset[int]
    max_new_tokens: int
    rows: int


class Flight:
    """Up to `limits.rows` rows under way.

    Two caches go along. The layers below the steering read tokens alone, so theirs has a slot for every text: rows that
    have said the same to the same prompt share it, and what they compute there. That of the layers above has a slot a
    row. Slots stay packed: whoever is last moves into the place of whoever leaves.
    """

    def __init__(self, split: SplitModel, prompts: Prompts, directions: Tensor, limits: Limits, work: Work):
        self._split, self._prompts, self._directions = split, prompts, directions
        self._limits, self._work = limits, work
        capacity = prompts.hidden.shape[1] + limits.max_new_tokens
        self._lower, self._upper = KeyValues(limits.rows, capacity), KeyValues(limits.rows, capacity)
        self._texts: list[Said] = []
        self._rows: list[Wanted] = []
        self._text_of: list[int] = []  # by row
        self._ends: list[int] = []  # by text: how many tokens it has, those of its prompt included
        self._unread = prompts.hidden[:0, 0]  # [n, d]: states below of the last n texts' last tokens, already known
        self._index, self._coefficient = steering_tensors((), split.device)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def free(self) -> int:
        return self._limits.rows - len(self._rows)

    def admit(self, newcomers: Sequence[Wanted], prefix: Prefix) -> None:
        """Let rows enter, ordered by the families of their prompts."""
        first = len(self._rows)
        self._rows += newcomers
        index, coefficient = steering_tensors([row.steering for row in newcomers], self._split.device)
        self._index = torch.cat([self._index, index])
        self._coefficient = torch.cat([self._coefficient, coefficient])
        self._read_prompts(newcomers, first, prefix)
        place = {prompt: n for n, prompt in enumerate(dict.fromkeys(row.prompt for row in newcomers), len(self._texts))}
        self._text_of += [place[row.prompt] for row in newcomers]
        self._begin_texts(list(place))

    def _read_prompts(self, newcomers: Sequence[Wanted], first: int, prefix: Prefix) -> None:
        """Write what the layers above read of each prompt, but for its last token."""
        ids, family, shared = self._prompts.ids, self._prompts.family, self._prompts.shared
        held = self._tensor([prefix.slot[(family[row.prompt], *row.steering)] for row in newcomers])
        self._upper.begin(slice(first, len(self._rows)), prefix.cache, held, max(shared))
        for number, alike in groupby(newcomers, key=lambda row: family[row.prompt]):
            rows = list(alike)
            slots, first = slice(first, first + len(rows)), first + len(rows)
            end = max(len(ids[row.prompt]) for row in rows) - 1
            if shared[number] < end and not self._split.nothing_above:
                fill(self._split, self._steered(rows, slots, shared[number], end), self._upper, slots, shared[number])
                self._work.prompt_above += sum(len(ids[row.prompt]) - 1 - shared[number] for row in rows)

    def _steered(self, rows: Sequence[Wanted], slots: slice, start: int, end: int) -> Tensor:
        """States [n, end - start, d] after the steered layer, of the rows' prompts at these positions."""
        hidden = self._prompts.hidden[self._tensor([row.prompt for row in rows]), start:end]
        return steer_(hidden, self._directions, self._index[slots], self._coefficient[slots])

    def _begin_texts(self, prompts: Sequence[int]) -> None:
        """Nothing has been said to these prompts; what the layers below make of their last tokens is known."""
        ends = [len(self._prompts.ids[prompt]) for prompt in prompts]
        number = self._tensor(prompts)
        slots = slice(len(self._texts), len(self._texts) + len(prompts))
        self._lower.begin(slots, self._prompts.cache, number, max(ends))
        self._texts += [Said(prompt, ()) for prompt in prompts]
        self._ends += ends
        self._unread = torch.cat([self._unread, self._prompts.hidden[number, self._tensor(ends) - 1]])

    def step(self) -> Finished:
        """One more token for every row; returns the replies that are complete, with the rows that gave them."""
        positions = [end - 1 for end in self._ends]
        hidden = self._states_below(positions)[self._tensor(self._text_of)][:, None]
        steer_(hidden, self._directions, self._index, self._coefficient)
        slots = slice(0, len(self._rows))
        cache = self._next(self._upper, slots, [positions[text] for text in self._text_of])
        best = self._split.above(hidden, *cache)[:, -1].argmax(-1).tolist()
        self._work.steps += 1
        self._work.row_above += len(self._rows)

        branches: dict[tuple[int, int], list[int]] = {}
        for row, branch in enumerate(zip(self._text_of, best, strict=True)):
            branches.setdefault(branch, []).append(row)
        said: dict[Said, list[int]] = {}
        source = {}
        for (text, token), rows in branches.items():  # texts that have become the same are one from here on
            before = self._texts[text]
            now = Said(before.prompt, (*before.tokens, token))
            said.setdefault(now, []).extend(rows)
            source[now] = text
        finished, going = [], {}
        for text, rows in said.items():
            if text.tokens[-1] in self._limits.ends or len(text.tokens) == self._limits.max_new_tokens:
                finished.append((text, [self._rows[row] for row in rows]))
            else:
                going[text] = rows
        texts = list(going)
        texts = [texts[n] for n in packed([source[text] for text in texts])]
        sources = [source[text] for text in texts]
        self._lower.rearrange(sources)
        self._texts, self._ends = texts, [self._ends[text] + 1 for text in sources]
        self._keep({row: n for n, text in enumerate(texts) for row in going[text]})
        return finished

    def _states_below(self, positions: list[int]) -> Tensor:
        """States [texts, d] after the steered layer of every text's last token."""
        known, self._unread = self._unread, self._unread[:0]
        speaking = len(self._texts) - len(known)
        if not speaking:
            return known
        tokens = self._tensor([text.tokens[-1:] for text in self._texts[:speaking]])
        hidden = self._split.below(tokens, *self._next(self._lower, slice(0, speaking), positions[:speaking]))[:, 0]
        self._work.text_below += speaking
        return torch.cat([hidden, known]) if len(known) else hidden

    def _next(self, cache: KeyValues, slots: slice, positions: list[int]) -> tuple[Tensor, KeyValues]:
        """Positions [n, 1], or [1, 1] where all agree, and the cache told of one token at each of them."""
        length = max(positions) + 1
        if min(positions) + 1 == length:
            return self._tensor([positions[:1]]), cache.write_next(slots, length - 1, length)
        of_row = self._tensor(positions)
        return of_row[:, None], cache.write_next(slots, of_row, length)

    def _keep(self, text_of: Mapping[int, int]) -> None:
        """Only these rows go on, by their slots, with these texts."""
        if len(text_of) == len(self._rows):
            self._text_of = [text_of[row] for row in range(len(self._rows))]
            return
        left = sorted(text_of)
        left = [left[n] for n in packed(left)]
        self._text_of = [text_of[row] for row in left]
        self._upper.rearrange(left)
        self._rows = [self._rows[row] for row in left]
        chosen = self._tensor(left)
        self._index, self._coefficient = self._index[chosen], self._coefficient[chosen]

    def _tensor(self, values: Sequence) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._split.device)


def packed(sources: Sequence[int]) -> list[int]:
    """The order in which sequences that go on from slots `sources` take slots 0 to n - 1, so that most keep theirs."""
    count = len(sources)
    order: list[int | None] = [None] * count
    moving = []
    for n, source in enumerate(sources):
        if source < count and order[source] is None:
            order[source] = n
        else:
            moving.append(n)
    return [moving.pop() if n is None else n for n in order]
