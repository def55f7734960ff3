"""Steering: a vector added to the residual stream while a model generates."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lockin_fast.blocking.layers import decoder_layer, residual_stream
from lockin_fast.generation import generate


@contextmanager
def steered(layer: nn.Module, vectors: Tensor) -> Iterator[None]:
    """Inside, vectors[row] [B, d] is added to `layer`'s output of that batch row, at every position."""

    def add(module, inputs, output):
        hidden = residual_stream(output)
        hidden = hidden + vectors[:, None].to(hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = layer.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class SteeredRow:
    """A reply: which prompt, and which direction is added how often. A coefficient of 0 leaves it alone."""

    prompt: int
    direction: int
    coefficient: float


def generate_steered(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Mapping[str, str]]],
    rows: Sequence[SteeredRow],
    directions: Tensor,
    *,
    layer: int,
    max_new_tokens: int,
    batch_size: int,
    done: Callable[[Mapping[int, str]], None] = lambda replies: None,
) -> list[str]:
    """Greedy replies with h <- h + coefficient * unit(directions[direction]) at `layer`'s output, at every position."""
    units = F.normalize(directions.float(), dim=1)
    replies = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]

        @contextmanager
        def around(batch, part=part):
            vectors = torch.stack([part[i].coefficient * units[max(part[i].direction, 0)] for i in batch])
            with steered(decoder_layer(model, layer), vectors):
                yield

        texts = generate(
            model, tokenizer, [prompts[row.prompt] for row in part], max_new_tokens=max_new_tokens,
            batch_size=batch_size, around=around,
        )  # fmt: skip
        done({start + i: text for i, text in enumerate(texts)})
        replies += texts
    return replies
