"""The rows of a steered generation that are under way, one token further at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lockin_fast.ops.steer import steer_
from lockin_fast.steering.key_values import KeyValues
from lockin_fast.steering.rows import Work
from lockin_fast.steering.split import SplitModel


class Wanted(NamedTuple):
    """A reply to be made: prompt, direction, coefficient."""

    prompt: int
    direction: int
    coefficient: float


class Said(NamedTuple):
    """What has been said to one prompt by one or more rows."""

    prompt: int
    tokens: list[int]


@dataclass(frozen=True)
class Prompts:
    """The prompts as the layers below leave them: ids, states [P, longest, d], and keys and values of those layers.

    shared: so many tokens all of them begin with, fewer than the shortest has.
    """

    ids: Sequence[list[int]]
    hidden: Tensor
    cache: KeyValues
    shared: int


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
        capacity = max(map(len, prompts.ids)) + limits.max_new_tokens
        self._lower, self._upper = KeyValues(limits.rows, capacity), KeyValues(limits.rows, capacity)
        self._texts: list[Said] = []
        self._rows: list[Wanted] = []
        self._text_of: list[int] = []  # by row
        self._unread = prompts.hidden[:0, 0]  # [n, d]: states below of the last n texts' last tokens, already known
        self._steer([])

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def free(self) -> int:
        return self._limits.rows - len(self._rows)

    def admit(self, newcomers: Sequence[Wanted], prefix: KeyValues, prefix_slots: Sequence[int]) -> None:
        """Let rows enter; prefix_slots: where `prefix` holds the tokens that all prompts share, as they are steered."""
        prompts, device, first = self._prompts, self._split.device, len(self._rows)
        new_texts = list(dict.fromkeys(row.prompt for row in newcomers))
        number = torch.tensor(new_texts, device=device)
        lengths = torch.tensor([len(prompts.ids[prompt]) for prompt in new_texts], device=device)
        longest = max(len(prompts.ids[prompt]) for prompt in new_texts)
        place = {prompt: len(self._texts) + n for n, prompt in enumerate(new_texts)}
        slots = slice(len(self._texts), len(self._texts) + len(new_texts))
        self._lower.begin(slots, prompts.cache, number, longest)
        self._unread = torch.cat([self._unread, prompts.hidden[number, lengths - 1]])
        self._texts += [Said(prompt, []) for prompt in new_texts]
        self._text_of += [place[row.prompt] for row in newcomers]
        self._rows += newcomers
        self._steer(self._rows)

        slots = slice(first, len(self._rows))
        self._upper.begin(slots, prefix, torch.tensor(prefix_slots, device=device), prompts.shared)
        if prompts.shared < longest - 1 and not self._split.nothing_above:
            asked = torch.tensor([row.prompt for row in newcomers], device=device)
            hidden = prompts.hidden[asked, prompts.shared : longest - 1]
            steer_(hidden, self._directions, self._index[slots], self._coefficient[slots])
            fill(self._split, hidden, self._upper, slots, prompts.shared)
            self._work.prompt_above += sum(len(prompts.ids[row.prompt]) - 1 - prompts.shared for row in newcomers)

    def step(self) -> list[tuple[Said, list[Wanted]]]:
        """One more token for every row; returns the replies that are complete, with the rows that gave them."""
        device = self._split.device
        positions = [len(self._prompts.ids[text.prompt]) + len(text.tokens) - 1 for text in self._texts]
        hidden = self._states_below(positions)
        above = hidden[torch.tensor(self._text_of, device=device)][:, None]
        steer_(above, self._directions, self._index, self._coefficient)
        slots = slice(0, len(self._rows))
        logits = self._split.above(above, *self._next(self._upper, slots, [positions[text] for text in self._text_of]))
        self._work.steps += 1
        self._work.row_above += len(self._rows)
        return self._say(logits.argmax(-1).tolist())

    def _states_below(self, positions: list[int]) -> Tensor:
        """States [texts, d] after the steered layer of every text's last token."""
        known, self._unread = self._unread, self._unread[:0]
        speaking = len(self._texts) - len(known)
        if not speaking:
            return known
        tokens = torch.tensor([[text.tokens[-1]] for text in self._texts[:speaking]], device=self._split.device)
        slots = slice(0, speaking)
        hidden = self._split.below(tokens, *self._next(self._lower, slots, positions[:speaking]))[:, 0]
        self._work.text_below += speaking
        return torch.cat([hidden, known]) if len(known) else hidden

    def _next(self, cache: KeyValues, slots: slice, positions: list[int]) -> tuple[Tensor, KeyValues]:
        """Positions [n, 1], or [1, 1] where all agree, and the cache told of one token at each of them."""
        length = max(positions) + 1
        if min(positions) + 1 == length:
            return torch.tensor([positions[:1]], device=self._split.device), cache.write_next(slots, length - 1, length)
        of_row = torch.tensor(positions, device=self._split.device)
        return of_row[:, None], cache.write_next(slots, of_row, length)

    def _say(self, tokens: list[int]) -> list[tuple[Said, list[Wanted]]]:
        said: dict[tuple[int, int], list[int]] = {}
        for row, key in enumerate(zip(self._text_of, tokens, strict=True)):
            said.setdefault(key, []).append(row)
        finished, going = [], []
        for (text, token), rows in said.items():
            prompt, before = self._texts[text]
            now = Said(prompt, [*before, token])
            if token in self._limits.ends or len(now.tokens) == self._limits.max_new_tokens:
                finished.append((now, [self._rows[row] for row in rows]))
            else:
                going.append((text, now, rows))

        going = [going[n] for n in packed([text for text, _, _ in going])]
        self._lower.rearrange([text for text, _, _ in going])
        self._texts = [now for _, now, _ in going]
        text_of = {row: n for n, (_, _, rows) in enumerate(going) for row in rows}
        left = sorted(text_of)
        left = [left[n] for n in packed(left)]
        self._text_of = [text_of[row] for row in left]
        if finished:
            self._upper.rearrange(left)
            self._rows = [self._rows[row] for row in left]
            self._steer(self._rows)
        return finished

    def _steer(self, rows: Sequence[Wanted]) -> None:
        steerings = [(row.direction, row.coefficient) for row in rows]
        self._index, self._coefficient = steering_tensors(steerings, self._split.device)


def steering_tensors(steerings: Sequence[tuple[int, float]], device: torch.device) -> tuple[Tensor, Tensor]:
    """The index and the coefficient that `steer_` takes."""
    return (
        torch.tensor([direction for direction, _ in steerings], dtype=torch.int64, device=device),
        torch.tensor([coefficient for _, coefficient in steerings], dtype=torch.float32, device=device),
    )


def fill(split: SplitModel, hidden: Tensor, cache: KeyValues, slots: slice, start: int) -> None:
    """Write the keys and values of all layers above for steered states [n, S, d] at positions from `start` on."""
    end = start + hidden.shape[1]
    positions = torch.arange(start, end, device=hidden.device)[None]
    split.above(hidden, positions, cache.write_next(slots, start, end, stop_at=split.top))


def packed(sources: Sequence[int]) -> list[int]:
    """The order in which sequences that go on from slots `sources` take slots 0 to n - 1, so that most keep theirs."""
    order: list[int | None] = [None] * len(sources)
    moving = []
    for n, source in enumerate(sources):
        if source < len(order) and order[source] is None:
            order[source] = n
        else:
            moving.append(n)
    return [moving.pop() if n is None else n for n in order]
