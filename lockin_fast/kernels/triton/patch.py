"""Rows written over with others: a program copies a stretch of one row, or decodes it."""

import torch
import triton
import triton.language as tl

from lockin_fast.kernels.triton._tiles import check_dtype, with_rows
from lockin_fast.kernels.triton.nf4 import value_of

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


@triton.jit
def patch_nf4_kernel(
    h, h_stride, rows, codes, absmax, channels, outliers, N, D, C, SIZE: tl.constexpr, BLOCK_D: tl.constexpr
):
    p = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.load(rows + p)
    if (row >= 0) & (row < N):
        packed = tl.load(codes + p * (D // 2) + d // 2, mask=d < D, other=0).to(tl.int32)
        scale = tl.load(absmax + p * (D // SIZE) + d // SIZE, mask=d < D, other=0.0)
        x = value_of(tl.where(d % 2 == 0, packed >> 4, packed)) * scale
        if channels is not None:
            for j in range(0, C):
                kept = tl.load(outliers + p * C + j).to(tl.float32)
                x = tl.where(d == tl.load(channels + j), kept, x)
        tl.store(h + row * h_stride + d, x.to(h.dtype.element_ty), mask=d < D)


def patch_(h, rows, source):
    """h[rows] <- source in place; see `lockin_fast.patch_`."""
    P, D = source.shape
    if not P * D:
        return
    # Bits are moved, not numbers, which the interpreter would get wrong in bfloat16.
    h, source = h.view(BITS[h.element_size()]), with_rows(source).view(BITS[h.element_size()])
    grid = P, triton.cdiv(D, BLOCK_D)
    patch_kernel[grid](h, h.stride(0), rows, source, source.stride(0), h.shape[0], D, BLOCK_D, **LAUNCH)


def patch_nf4_(h, rows, codes, absmax, channels, outliers, blocksize):
    """h[rows] <- decoded rows in place; see `lockin_fast.patch_`."""
    check_dtype(h.dtype)
    P, D = codes.shape[0], h.shape[1]
    if not P * D:
        return
    count = 0 if channels is None else channels.shape[0]
    kept = (channels, outliers.contiguous()) if count else (None, None)
    patch_nf4_kernel[(P, triton.cdiv(D, BLOCK_D))](
        h, h.stride(0), rows, codes.contiguous(), absmax.contiguous(), *kept, h.shape[0], D, count, SIZE=blocksize,
        BLOCK_D=BLOCK_D, **LAUNCH,
    )  # fmt: skip
