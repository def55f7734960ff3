"""Rows written over with others: a program copies a stretch of one row."""

import torch
import triton
import triton.language as tl

from lockin_fast.kernels.triton._tiles import with_rows

LAUNCH = {"num_warps": 4, "num_stages": 1}
BLOCK_D = 1024
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def patch_kernel(h, h_stride, rows, source, source_stride, N, D, BLOCK_D: tl.constexpr):
    p = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.load(rows + p)
    if (row >= 0) & (row < N):
        x = tl.load(source + p * source_stride + d, mask=d < D, other=0)
        tl.store(h + row * h_stride + d, x, mask=d < D)


def patch_(h, rows, source):
    """h[rows] <- source in place; see `lockin_fast.patch_`."""
    P, D = source.shape
    if not P * D:
        return
    # Bits are moved, not numbers, which the interpreter would get wrong in bfloat16.
    h, source = h.view(BITS[h.element_size()]), with_rows(source).view(BITS[h.element_size()])
    grid = P, triton.cdiv(D, BLOCK_D)
    patch_kernel[grid](h, h.stride(0), rows, source, source.stride(0), h.shape[0], D, BLOCK_D, **LAUNCH)
