"""Differences at listed positions: a program has a tile of positions and latents, and forms them as it reads."""

import torch
import triton
import triton.language as tl

from lockin_fast.kernels.triton._tiles import INTERPRETING, activate, check_dtype, floor_of, with_rows


@triton.jit
def diff_kernel(
    h, h_stride, rows, source, source_stride, weight, bias, threshold, norm, projection, change, N, P, K, D,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    latents = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = tl.load(rows + p, mask=p < P, other=-1)
    keep = (row >= 0) & (row < N)
    squares = tl.zeros((BLOCK_P,), dtype=tl.float64)
    moved = tl.zeros((BLOCK_P, BLOCK_K), dtype=tl.float32)
    pre = tl.zeros((BLOCK_P, BLOCK_K), dtype=tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        tile = keep[:, None] & (d < D)[None, :]
        x = tl.load(h + row[:, None] * h_stride + d[None, :], mask=tile, other=0.0).to(tl.float32)
        diff = tl.load(source + p[:, None] * source_stride + d[None, :], mask=tile, other=0.0).to(tl.float32) - x
        place = weight + latents.to(tl.int64)[None, :] * D + d[:, None]
        w = tl.load(place, mask=(latents < K)[None, :] & (d < D)[:, None], other=0.0).to(tl.float32)
        moved = tl.dot(diff, w, moved, input_precision=PRECISION)
        if bias is not None:
            pre = tl.dot(x, w, pre, input_precision=PRECISION)
        wide = diff.to(tl.float64)
        squares += tl.sum(wide * wide, axis=1)
    nothing = float("nan")  # where there is no such row
    out = p[:, None] * K + latents[None, :]
    tile = (p < P)[:, None] & (latents < K)[None, :]
    tl.store(projection + out, tl.where(keep[:, None], moved, nothing), mask=tile)
    if bias is not None:
        pre += tl.load(bias + latents, mask=latents < K, other=0.0)[None, :]
        floor = floor_of(threshold, latents, K)[None, :]
        z = activate(pre + moved, floor) - activate(pre, floor)
        tl.store(change + out, tl.where(keep[:, None], z, nothing), mask=tile)
    if tl.program_id(1) == 0:
        tl.store(norm + p, tl.where(keep, tl.sqrt(squares), nothing), mask=p < P)


def sizes(latents, dtype):
    """Of the launch; 16-bit weights are exact in tf32, whose three-term product keeps the fp32 difference.

    fp32 products hold their operands in registers: with 4 warps those run out, and the loop would spill.
    """
    return {
        "BLOCK_P": 32,
        "BLOCK_K": min(max(triton.next_power_of_2(latents), 16), 64),
        "BLOCK_D": 32,
        "PRECISION": "ieee" if dtype == torch.float32 or INTERPRETING else "tf32x3",
        "num_warps": 8 if dtype == torch.float32 else 4,
        "num_stages": 3,
    }


def patch_diff(h, rows, source, weight, bias, threshold):
    """norm [P], projection [P, K], change of the latents [P, K] or [0, 0]; see `lockin_fast.patch_diff`."""
    check_dtype(h.dtype)
    h, source, weight = with_rows(h), with_rows(source), weight.contiguous()
    (P, D), K = source.shape, weight.shape[0]
    norm = torch.empty((P,), dtype=torch.float32, device=h.device)
    projection = torch.empty((P, K), dtype=torch.float32, device=h.device)
    change = torch.empty((P, K) if bias is not None else (0, 0), dtype=torch.float32, device=h.device)
    if P:
        constants = sizes(K, h.dtype)
        grid = triton.cdiv(P, constants["BLOCK_P"]), max(triton.cdiv(K, constants["BLOCK_K"]), 1)
        diff_kernel[grid](
            h, h.stride(0), rows, source, source.stride(0), weight, bias, threshold, norm, projection, change,
            h.shape[0], P, K, D, **constants,
        )  # fmt: skip
    return norm, projection, change
