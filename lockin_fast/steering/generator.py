"""Greedy replies under steering, many steerings in one batch, and nothing computed twice that they share."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lockin_fast.generation import decoding, generating, tokenised
from lockin_fast.ops.steer import steer_
from lockin_fast.steering.flight import Flight, Limits, Prompts, Said, Wanted, fill, steering_tensors
from lockin_fast.steering.hook import generate_by_hook
from lockin_fast.steering.key_values import KeyValues
from lockin_fast.steering.rows import SteeredRow, Work, check_request
from lockin_fast.steering.split import SplitModel, why_not_split

Chat = Sequence[Mapping[str, str]]
Done = Callable[[Mapping[int, str]], None]


def generate_steered(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Chat],
    rows: Sequence[SteeredRow],
    directions: Tensor,
    *,
    layer: int,
    max_new_tokens: int,
    batch_size: int,
    done: Done = lambda finished: None,
) -> list[str]:
    """Greedy replies under steering, in the order of `rows`; see `SteeredGenerator`, which also counts the work."""
    generator = SteeredGenerator(
        model, tokenizer, directions, layer=layer, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    return generator(prompts, rows, done)


class SteeredGenerator:
    """Greedy replies of a model whose residual stream is steered, every row along a direction of its own:

        h[row] <- h[row] + coefficient[row] * unit(directions[direction[row]])    at all positions, after layer `layer`

    model: a causal language model of Hugging Face, with a PEFT adapter or quantised if you like. directions: [F, d],
    e.g. an SAE's decoder. layer: 0-based. batch_size: rows under way at once. A call returns the replies, and `work`
    then tells what they took (added up over calls).

    The replies are those of `generate` with a steering hook, row by row: in float32 but for ties within rounding, in
    16 bits wherever the best token leads by more than their rounding. What steering cannot change is computed once:
    the layers up to `layer` see tokens alone, so they run once for every prompt, and while rows of one prompt have said
    the same, once for all of them. The layers above run once a steering on the tokens that all prompts begin with, and
    by row from there. Rows that are complete leave and others enter.

    Costs memory for keys and values: batch_size * (longest prompt + max_new_tokens) tokens of all layers at most, and
    the prompts' own up to `layer`. One synchronisation with the host a token.

    A model that cannot be split at a layer (see `why_not_split`) is steered by a hook instead, row by row through all
    layers: a warning says so and why, as does `work.fallback`.
    """

    def __init__(
        self, model: Any, tokenizer: Any, directions: Tensor, *, layer: int, max_new_tokens: int, batch_size: int
    ):
        check_request(model, (), (), directions, layer, max_new_tokens=max_new_tokens, batch_size=batch_size)
        self._model, self._tokenizer, self._directions, self._layer = model, tokenizer, directions, layer
        self._max_new_tokens, self._batch_size = max_new_tokens, batch_size
        self.work = Work(fallback=why_not_split(model))
        if self.work.fallback:
            warnings.warn(
                f"steering: {self.work.fallback}; every row runs through all layers, which is slower", stacklevel=2
            )

    def __call__(
        self, prompts: Sequence[Chat], rows: Sequence[SteeredRow], done: Done = lambda finished: None
    ) -> list[str]:
        """One reply for each of `rows`, in their order: new tokens only, without special tokens.

        prompts: lists of chat messages, rendered as `generate` does. done: called with {row: reply} of the rows that
        have just become complete, as soon as they are. Raises ValueError, before any work, for a row out of range.
        """
        limits = {"max_new_tokens": self._max_new_tokens, "batch_size": self._batch_size}
        check_request(self._model, prompts, rows, self._directions, self._layer, **limits)
        if self.work.fallback:
            options = {"layer": self._layer, **limits, "done": done}
            return generate_by_hook(self._model, self._tokenizer, prompts, rows, self._directions, **options)
        asked: dict[Wanted, list[int]] = {}
        for number, row in enumerate(rows):
            asked.setdefault(Wanted(row.prompt, *row.steering), []).append(number)
        replies = [""] * len(rows)
        for said, wanted in self._replies(prompts, list(asked)):
            text = self._tokenizer.decode(said, skip_special_tokens=True).strip()
            finished = {number: text for row in wanted for number in asked[row]}
            for number in finished:
                replies[number] = text
            done(finished)
        return replies

    @torch.no_grad()
    def _replies(self, prompts: Sequence[Chat], wanted: list[Wanted]) -> Iterator[tuple[list[int], list[Wanted]]]:
        """(tokens, the rows that said them), as they become complete."""
        if not wanted:
            return
        numbers = list(dict.fromkeys(row.prompt for row in wanted))
        ids, by_length = tokenised(self._tokenizer, [prompts[number] for number in numbers])
        ids, numbers = [ids[n] for n in by_length], [numbers[n] for n in by_length]
        place = {number: n for n, number in enumerate(numbers)}
        by_steering: dict[tuple[int, float], list[Wanted]] = {}
        for row in wanted:
            by_steering.setdefault(row[1:], []).append(row._replace(prompt=place[row.prompt]))
        shared = common_beginning(ids) if len(by_steering) < len(wanted) else 0

        config = decoding(self._model, self._tokenizer, self._max_new_tokens, 0.0)
        ends = [config.eos_token_id] if isinstance(config.eos_token_id, int) else config.eos_token_id or ()
        limits = Limits(frozenset(ends), self._max_new_tokens, self._batch_size)
        with generating(self._model, config, seed=0):
            split = SplitModel(self._model, self._layer)
            directions = self._directions.to(split.device)
            states = self._prompts_below(split, ids, shared)
            flight = Flight(split, states, directions, limits, self.work)
            for steerings in _batches(list(by_steering), self._batch_size):
                prefix = self._prefix_above(split, states, directions, steerings)
                slot = {steering: n for n, steering in enumerate(steerings)}
                rows = sorted(row for steering in steerings for row in by_steering[steering])
                while rows:
                    while flight.free < min(len(rows), -(-self._batch_size // 4)):  # few at a time cost as much as many
                        yield from _numbered(flight.step(), numbers)
                    newcomers, rows = rows[: flight.free], rows[flight.free :]
                    flight.admit(newcomers, prefix, [slot[row[1:]] for row in newcomers])
            while len(flight):
                yield from _numbered(flight.step(), numbers)

    def _prompts_below(self, split: SplitModel, ids: Sequence[list[int]], shared: int) -> Prompts:
        """The prompts, longest first, through the layers below. Padding stands on the right, where nothing reads it."""
        cache, hidden = KeyValues(len(ids), len(ids[0])), None
        for numbers in _batches(range(len(ids)), self._batch_size):
            longest = len(ids[numbers[0]])
            slots = slice(numbers[0], numbers[-1] + 1)
            batch = torch.tensor([ids[n] + [0] * (longest - len(ids[n])) for n in numbers], device=split.device)
            positions = torch.arange(longest, device=split.device)[None]
            found = split.below(batch, positions, cache.write_next(slots, 0, longest))
            if hidden is None:
                hidden = found.new_zeros(len(ids), longest, found.shape[2])
            hidden[slots, :longest] = found
        self.work.prompt_below += sum(map(len, ids))
        return Prompts(ids, hidden, cache, shared)

    def _prefix_above(
        self, split: SplitModel, prompts: Prompts, directions: Tensor, steerings: Sequence[tuple[int, float]]
    ) -> KeyValues:
        """Keys and values of the layers above for the tokens that all prompts begin with, a slot a steering."""
        cache = KeyValues(len(steerings), prompts.shared)
        if prompts.shared and not split.nothing_above:
            hidden = prompts.hidden[:1, : prompts.shared].repeat(len(steerings), 1, 1)
            steer_(hidden, directions, *steering_tensors(steerings, split.device))
            fill(split, hidden, cache, slice(0, len(steerings)), 0)
            self.work.prompt_above += len(steerings) * prompts.shared
        return cache


def common_beginning(ids: Sequence[list[int]]) -> int:
    """How many tokens all of `ids` begin with, at most all but the last of the shortest."""
    shortest = min(map(len, ids)) - 1
    return next((n for n in range(shortest) if len({row[n] for row in ids}) > 1), shortest)


def _batches(items: Sequence, size: int) -> list[Sequence]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _numbered(finished: Sequence[tuple[Said, list[Wanted]]], numbers: Sequence[int]) -> Iterator:
    """The same with the caller's numbers of the prompts."""
    for said, rows in finished:
        yield said.tokens, [row._replace(prompt=numbers[row.prompt]) for row in rows]
