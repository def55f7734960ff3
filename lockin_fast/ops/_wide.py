"""What the full-width ops share: an encode in tiles, buffers that are made once, weights cast in parts."""

import torch

from lockin_fast.ops.encode_latents import inactive

# Elements of a tile: 4 MB of each operand, 2 MB of products in fp32; many times the cost of a thread.
OPERAND_ELEMENTS = 2**20
PRODUCT_ELEMENTS = 2**19
CAST_ELEMENTS = 2**22  # of a weight in another dtype than h's, cast at a time: 16 MB in fp32


def tile_shape(tokens, width, latents):
    """Tokens and latents of a tile, so that operands and products stay within their budgets."""
    side = max(OPERAND_ELEMENTS // max(width, 1), 1)
    tile_tokens = max(min(tokens, side, 1024), 1)
    return tile_tokens, max(min(latents, side, PRODUCT_ELEMENTS // tile_tokens), 1)


class Buffer:
    """Memory for a matrix of at most `shape`, made at the first use and kept."""

    def __init__(self, shape, dtype, device):
        self.shape, self.dtype, self.device, self.memory = shape, dtype, device, None

    def shaped(self, rows, columns):
        if self.memory is None:
            self.memory = torch.empty(self.shape[0] * self.shape[1], dtype=self.dtype, device=self.device)
        return self.memory[: rows * columns].view(rows, columns)

    def holding(self, x):
        """`x` itself where it has the dtype, else a copy here."""
        return x if x.dtype == self.dtype else self.shaped(*x.shape).copy_(x)


def encode_tile(x, weight, bias, threshold, out):
    """Latents of one tile [tokens, latents] in `out`."""
    with torch.autocast(x.device.type, enabled=False):
        pre = torch.addmm(bias, x, weight, out=out)
    return pre.relu_() if threshold is None else pre.masked_fill_(inactive(pre, threshold), 0.0)


def cast_parts(weight, dtype):
    """The rows of `weight` in `dtype` as (slice, rows), one part after the other in the same memory.

    One buffer, as fresh ones would pile up in the heap; a weight of that dtype is one part, itself.
    """
    if weight.dtype is dtype and weight.is_contiguous():
        yield slice(0, weight.shape[0]), weight
        return
    size = max(CAST_ELEMENTS // max(weight.shape[1], 1), 1)
    cast = torch.empty((min(size, weight.shape[0]), weight.shape[1]), dtype=dtype, device=weight.device)
    for start in range(0, max(weight.shape[0], 1), size):
        part = slice(start, start + size)
        yield part, cast[: weight[part].shape[0]].copy_(weight[part])
