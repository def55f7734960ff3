"""Steering: a vector added to the residual stream while a model generates."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lockin_fast.blocking.layers import residual_stream


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
