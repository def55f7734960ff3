"""Every row of the batch along a direction of its own: first the norm of each row's direction, then the addition."""

import torch
import triton
import triton.language as tl

from lockin_fast.kernels.triton._tiles import check_dtype

LAUNCH = {"num_warps": 4, "num_stages": 1}
BLOCK_D = 1024


@triton.jit
def norm_kernel(directions, index, coefficient, norms, F, D, BLOCK_D: tl.constexpr):
    """The norm of each row's direction, in fp64: squares leave fp32's range. 0 for a row that is left alone."""
    r = tl.program_id(0)
    chosen = tl.load(index + r)
    squares = tl.zeros((BLOCK_D,), dtype=tl.float64)
    if (chosen >= 0) & (chosen < F) & (tl.load(coefficient + r) != 0.0):
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            x = tl.load(directions + chosen * D + d, mask=d < D, other=0.0).to(tl.float64)
            squares += x * x
    tl.store(norms + r, tl.sqrt(tl.sum(squares)))


@triton.jit
def steer_kernel(h, row_stride, stride, directions, index, coefficient, norms, S, D, BLOCK_D: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) // S
    s = tl.program_id(0).to(tl.int64) % S
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    norm = tl.load(norms + r)
    if norm != 0.0:  # NaN is unequal too
        scale = tl.load(coefficient + r).to(tl.float64) / norm
        v = tl.load(directions + tl.load(index + r) * D + d, mask=d < D, other=0.0)
        place = h + r * row_stride + s * stride + d
        x = tl.load(place, mask=d < D, other=0.0).to(tl.float32)
        tl.store(place, x + (v.to(tl.float64) * scale).to(tl.float32), mask=d < D)


def steer_(h, directions, index, coefficient):
    """Adds in place; see `lockin_fast.steer_`."""
    check_dtype(h.dtype)
    check_dtype(directions.dtype)
    view = h[:, None] if h.dim() == 2 else h
    R, S, D = view.shape
    if not view.numel() or not directions.shape[0]:
        return
    directions = directions.contiguous()
    norms = torch.empty((R,), dtype=torch.float64, device=h.device)
    norm_kernel[(R,)](directions, index, coefficient, norms, directions.shape[0], D, BLOCK_D, **LAUNCH)
    steer_kernel[(R * S, triton.cdiv(D, BLOCK_D))](
        view, view.stride(0), view.stride(1), directions, index, coefficient, norms, S, D, BLOCK_D, **LAUNCH
    )
