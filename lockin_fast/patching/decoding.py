"""Replies that go on from what patched prompts left: rows come and go, and may be of two sides, one above the other."""

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lockin_fast.patching.sides import Side, Sides
from lockin_fast.steering.flight import packed
from lockin_fast.steering.key_values import KeyValues
from lockin_fast.steering.split import SplitModel, why_not_split


@dataclass(frozen=True)
class Start:
    """A prompt that has been read, and is about to be answered.

    keys_values: of every layer, [heads, S, head_dim] each, without pads. logits: [V], of its last token. draws: uniform
    numbers in [0, 1), one for each token of the reply; not looked at in greedy decoding.
    """

    key: Hashable
    keys_values: Mapping[int, tuple[Tensor, Tensor]]
    logits: Tensor
    draws: Tensor | None = None


@dataclass(frozen=True)
class Limits:
    """When a reply ends: at one of the tokens `ends`, or at this many tokens. rows: so many are under way at most."""

    ends: frozenset[int]
    max_new_tokens: int
    rows: int
    temperature: float = 0.0


@dataclass
class _Row:
    key: Hashable
    length: int  # tokens of the prompt
    draws: Tensor | None
    said: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Of the last token, which is to be read."""
        return self.length + len(self.said) - 1


@dataclass(frozen=True)
class Spoken:
    """Who speaks: layers up to and with `through` are those of `lower`, the rest and the unembedding those of `upper`.

    Every state of a token that is generated is then, after layer `through`, that of `lower` on the same tokens, and
    `upper` goes on from it: decode-time patching, at the cost of plain decoding.
    """

    lower: Side
    upper: Side
    through: int = 0


def check_decoding(model: nn.Module) -> None:
    """Raise ValueError for a model whose rows cannot come and go in one batch."""
    if why := why_not_split(model):
        raise ValueError(f"model: {why}, so that patched replies cannot be generated; take logit differences alone")


@torch.no_grad()
def decode(
    model: nn.Module, sides: Sides, spoken: Spoken, starts: Iterable[Start], limits: Limits
) -> Iterator[tuple[Hashable, list[int]]]:
    """(key, tokens of the reply without the one that ends it) of every start, as replies become complete.

    starts: taken from as places get free, so that what they are computed by may be done as late.
    Sampling is by inversion: the first token at which the cumulated distribution exceeds the row's draw. So a reply
    depends on its own draws alone, and different patches of one prompt can share theirs.
    """
    split = SplitModel(model, spoken.through)
    cache, rows, starts = KeyValues(limits.rows, 2**31), [], iter(starts)
    while True:
        while len(rows) < limits.rows and (start := next(starts, None)) is not None:
            length = next(iter(start.keys_values.values()))[0].shape[1]
            row = _Row(start.key, length, start.draws)
            if _say([row], start.logits[None], limits):
                yield row.key, row.said
                continue
            slot = slice(len(rows), len(rows) + 1)
            for layer, (keys, values) in start.keys_values.items():
                cache.write_next(slot, 0, length).update(keys[None], values[None], layer)
            rows.append(row)
        if not rows:
            return
        logits = _read(split, sides, spoken, cache, rows)
        ended = set(_say(rows, logits, limits))
        for number in sorted(ended):
            yield rows[number].key, rows[number].said
        if ended:
            left = [number for number in range(len(rows)) if number not in ended]
            left = [left[n] for n in packed(left)]
            cache.rearrange(left)
            rows = [rows[number] for number in left]


def _read(split: SplitModel, sides: Sides, spoken: Spoken, cache: KeyValues, rows: list[_Row]) -> Tensor:
    """Logits [n, V] after the last token of every row."""
    positions = torch.tensor([row.position for row in rows], device=split.device)
    tokens = torch.tensor([[row.said[-1]] for row in rows], device=split.device)
    cache.write_next(slice(0, len(rows)), positions, max(row.position for row in rows) + 1)
    with sides.as_model(spoken.lower):
        hidden = split.below(tokens, positions[:, None], cache)
    with sides.as_model(spoken.upper):
        return split.above(hidden, positions[:, None], cache)[:, -1]


def _say(rows: list[_Row], logits: Tensor, limits: Limits) -> list[int]:
    """Let every row say its next token; return the numbers of those that have ended."""
    if limits.temperature:
        draws = torch.stack([row.draws[len(row.said)] for row in rows]).to(logits.device)
        cumulated = (logits.float() / limits.temperature).softmax(-1).cumsum(-1)
        # The sum may end a little below 1.
        tokens = (cumulated <= draws[:, None] * cumulated[:, -1:]).sum(-1).clamp(max=logits.shape[-1] - 1)
    else:
        tokens = logits.argmax(-1)
    ended = []
    for number, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
        if token not in limits.ends:
            row.said.append(token)
        if token in limits.ends or len(row.said) == limits.max_new_tokens:
            ended.append(number)
    return ended


def draws(seed: int, prompt: int, sample: int, count: int) -> Tensor:
    """Uniform numbers for a reply: the same for every patch of this prompt and sample."""
    generator = torch.Generator("cpu").manual_seed((seed * 1_000_003 + prompt) * 8_191 + sample)
    return torch.rand(count, generator=generator, device="cpu")


def ends_of(config: Any) -> frozenset[int]:
    """The tokens that end a reply, of a GenerationConfig."""
    ends = config.eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends or ())
