"""Every row of the batch along a direction of its own: first the scale of each row, then the addition."""

import torch
import triton
import triton.language as tl

from lockin_fast.kernels.triton._tiles import check_dtype

LAUNCH = {"num_warps": 4, "num_stages": 1}
BLOCK_D = 1024


@triton.jit
def scale_kernel(directions, index, coefficient, scale, F, D, BLOCK_D: tl.constexpr):
    r = tl.program_id(0)
    chosen = tl.load(index + r)
    wanted = tl.load(coefficient + r)
    factor = wanted.to(tl.float64) * 0.0
    if (chosen >= 0) & (chosen < F) & (wanted != 0.0):
        squares = tl.zeros((BLOCK_D,), dtype=tl.float64)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            x = tl.load(directions + chosen * D + d, mask=d < D, other=0.0).to(tl.float64)
            squares += x * x
        norm = tl.sqrt(tl.sum(squares))
        if norm != 0.0:
            factor = wanted.to(tl.float64) / norm
    tl.store(scale + r, factor)


@triton.jit
def steer_kernel(h, row_stride, stride, directions, index, scale, S, D, BLOCK_D: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) // S
    s = tl.program_id(0).to(tl.int64) % S
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    factor = tl.load(scale + r)
    if factor != 0.0:  # NaN is unequal too
        v = tl.load(directions + tl.load(index + r) * D + d, mask=d < D, other=0.0)
        place = h + r * row_stride + s * stride + d
        x = tl.load(place, mask=d < D, other=0.0).to(tl.float32)
        tl.store(place, x + (v.to(tl.float64) * factor).to(tl.float32), mask=d < D)


def steer_(h, directions, index, coefficient):
    """Adds in place; see `lockin_fast.steer_`."""
    check_dtype(h.dtype)
    check_dtype(directions.dtype)
    view = h[:, None] if h.dim() == 2 else h
    R, S, D = view.shape
    if not view.numel() or not directions.shape[0]:
        return
    directions = directions.contiguous()
    scale = torch.empty((R,), dtype=torch.float64, device=h.device)
    scale_kernel[(R,)](directions, index, coefficient, scale, directions.shape[0], D, BLOCK_D, **LAUNCH)
    grid = R * S, triton.cdiv(D, BLOCK_D)
    steer_kernel[grid](view, view.stride(0), view.stride(1), directions, index, scale, S, D, BLOCK_D, **LAUNCH)
