"""The rows of a steered generation that are under way, one token further at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from lockin_fast.ops.steer import steer_
from lockin_fast.steering.key_values import KeyValues
from lockin_fast.steering.prompts import Prefix, Prompts, batches, fill, steering_tensors
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

    def reached(self, tokens: Sequence[int]) -> bool:
        return len(tokens) == self.max_new_tokens or (len(tokens) > 0 and tokens[-1] in self.ends)


class Flight:
    """Up to `limits.rows` rows under way.

    Two caches go along. The layers below the steering read tokens alone, so theirs has a slot for every text: rows that
    have said the same to the same prompt share it, and what they compute there. That of the layers above has a slot a
    row. Slots stay packed: whoever is last moves into the place of whoever leaves.

    A row that enters first reads the draft of its reply, as though it were part of the prompt: as far as it would have
    said the same, all its tokens are known at once.
    """

    def __init__(self, split: SplitModel, prompts: Prompts, directions: Tensor, limits: Limits, work: Work):
        self._split, self._prompts, self._directions = split, prompts, directions
        self._limits, self._work = limits, work
        capacity = prompts.hidden.shape[1] + limits.max_new_tokens
        self._lower, self._upper = KeyValues(limits.rows, capacity), KeyValues(limits.rows, capacity)
        self._texts: list[Said] = []
        self._rows: list[Wanted] = []
        self._text_of: list[int] = []  # by row
        self._unread = prompts.hidden[:0, 0]  # [n, d]: states below of the last n texts' last tokens, already known
        self._steer()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def free(self) -> int:
        return self._limits.rows - len(self._rows)

    def admit(self, newcomers: Sequence[Wanted], prefix: Prefix) -> Finished:
        """Let rows enter, ordered by the families of their prompts. Returns the replies that are complete already."""
        first = len(self._rows)
        self._rows += newcomers
        self._steer()
        self._read_prompts(newcomers, first, prefix)
        tokens = self._read_drafts(newcomers, first)

        said: dict[Said, list[int]] = {}
        for row, (wanted, now) in enumerate(zip(newcomers, tokens, strict=True), first):
            said.setdefault(Said(wanted.prompt, now), []).append(row)
        finished, going = self._parted(said)
        text_of = dict(enumerate(self._text_of))
        for n, rows in enumerate(going.values(), len(self._texts)):
            text_of |= dict.fromkeys(rows, n)
        if going:
            self._begin_texts(list(going))
        self._keep(text_of)
        return finished

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

    def _read_drafts(self, newcomers: Sequence[Wanted], first: int) -> list[tuple[int, ...]]:
        """What each newcomer says at once: its draft as far as it agrees, and its own next token where it does not."""
        ids, drafts = self._prompts.ids, self._prompts.drafts
        said: list[tuple[int, ...]] = []
        for length, alike in groupby(newcomers, key=lambda row: len(ids[row.prompt])):
            rows = list(alike)
            longest = max(len(drafts[row.prompt]) for row in rows)
            if not longest:
                said += [()] * len(rows)
                continue
            start, end = length - 1, length - 1 + longest
            positions = torch.arange(start, end, device=self._split.device)[None]
            # As many tokens in a forward as a step of all rows has.
            for part in batches(rows, max(1, self._limits.rows // longest)):
                slots = slice(first + len(said), first + len(said) + len(part))
                hidden = self._steered(part, slots, start, end)
                logits = self._split.above(hidden, positions, self._upper.write_next(slots, start, end))
                best = logits.argmax(-1).tolist()
                said += [agreed(drafts[row.prompt], own) for row, own in zip(part, best, strict=True)]
                self._work.row_above += sum(len(drafts[row.prompt]) for row in part)
                self._work.steps += 1
        return said

    def _steered(self, rows: Sequence[Wanted], slots: slice, start: int, end: int) -> Tensor:
        """States [n, end - start, d] after the steered layer, of the rows' prompts and drafts at these positions."""
        hidden = self._prompts.hidden[self._tensor([row.prompt for row in rows]), start:end]
        return steer_(hidden, self._directions, self._index[slots], self._coefficient[slots])

    def _begin_texts(self, new: Sequence[Said]) -> None:
        ends = [len(self._prompts.ids[text.prompt]) + len(text.tokens) for text in new]
        slots = slice(len(self._texts), len(self._texts) + len(new))
        prompt = self._tensor([text.prompt for text in new])
        self._lower.begin(slots, self._prompts.cache, prompt, max(ends))
        self._texts += new
        if not any(text.tokens for text in new):  # the last token is the prompt's own
            self._unread = torch.cat([self._unread, self._prompts.hidden[prompt, self._tensor(ends) - 1]])

    def step(self) -> Finished:
        """One more token for every row; returns the replies that are complete, with the rows that gave them."""
        positions = [len(self._prompts.ids[text.prompt]) + len(text.tokens) - 1 for text in self._texts]
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
            now = self._texts[text]._replace(tokens=(*self._texts[text].tokens, token))
            said.setdefault(now, []).extend(rows)
            source[now] = text
        finished, going = self._parted(said)
        texts = list(going)
        texts = [texts[n] for n in packed([source[text] for text in texts])]
        self._lower.rearrange([source[text] for text in texts])
        self._texts = texts
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

    def _parted(self, said: Mapping[Said, list[int]]) -> tuple[Finished, dict[Said, list[int]]]:
        """The texts that are complete with their rows, and the others with the slots of theirs."""
        complete = [text for text in said if self._limits.reached(text.tokens)]
        going = {text: rows for text, rows in said.items() if not self._limits.reached(text.tokens)}
        return [(text, [self._rows[row] for row in said[text]]) for text in complete], going

    def _keep(self, text_of: Mapping[int, int]) -> None:
        """Only these rows go on, by their slots, with these texts."""
        left = sorted(text_of)
        left = [left[n] for n in packed(left)]
        self._text_of = [text_of[row] for row in left]
        if len(left) < len(self._rows):
            self._upper.rearrange(left)
            self._rows = [self._rows[row] for row in left]
            self._steer()

    def _steer(self) -> None:
        steerings = [row.steering for row in self._rows]
        self._index, self._coefficient = steering_tensors(steerings, self._split.device)

    def _tensor(self, values: Sequence) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._split.device)


def agreed(draft: tuple[int, ...], best: Sequence[int]) -> tuple[int, ...]:
    """What is said by whom says best[n] after draft[:n]: the draft up to the first difference, then its own token."""
    own = next((n for n, token in enumerate(draft) if token != best[n]), None)
    return draft if own is None else (*draft[:own], best[own])


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
