"""Steering by a hook and the model's own `generate`: any model, nothing shared between rows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lockin_fast.blocking.layers import decoder_layer, residual_stream
from lockin_fast.generation import generate, tokenised
from lockin_fast.ops.steer import steering
from lockin_fast.steering.rows import SteeredRow


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


def generate_by_hook(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Mapping[str, str]]],
    rows: Sequence[SteeredRow],
    directions: Tensor,
    *,
    layer: int,
    max_new_tokens: int,
    batch_size: int,
    done: Callable[[Mapping[int, str]], None] = lambda finished: None,
) -> list[str]:
    """The replies of `generate_steered`, for any model that `generate` takes; every row costs all layers."""
    device = model.get_input_embeddings().weight.device
    steerings = [row.steering for row in rows]
    index = torch.tensor([direction for direction, _ in steerings], dtype=torch.int64, device=device)
    coefficient = torch.tensor([coefficient for _, coefficient in steerings], device=device)
    vectors = steering(directions.to(device), index, coefficient)
    module = decoder_layer(model, layer)
    _, by_length = tokenised(tokenizer, prompts)
    rank = {prompt: place for place, prompt in enumerate(by_length)}
    order = sorted(range(len(rows)), key=lambda i: (rank[rows[i].prompt], i))
    replies = [""] * len(rows)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        said = generate(
            model,
            tokenizer,
            [prompts[rows[i].prompt] for i in chosen],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            around=lambda batch, chosen=chosen: steered(module, vectors[[chosen[i] for i in batch]]),
        )
        finished = dict(zip(chosen, said, strict=True))
        for i, reply in finished.items():
            replies[i] = reply
        done(finished)
    return replies
