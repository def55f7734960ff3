"""Generalised Jensen-Shannon divergence: a program per row normalises it, then one per position and share of V sums."""

import math

import torch
import triton
import triton.language as tl

from lockin_fast.kernels.triton._tiles import check_dtype

LAUNCH = {"num_warps": 4, "num_stages": 2}
TILES = 8  # of the vocabulary, per program of the second kernel


@triton.jit
def normaliser_kernel(
    logits, prompt_stride, position_stride, weights, shifts, scales, N, V, BLOCK_V: tl.constexpr
):  # fmt: skip
    position, prompt = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if tl.load(weights + prompt) != 0.0:
        row = logits + prompt * prompt_stride + position * position_stride
        largest = float("-inf")
        total = 0.0
        for v0 in range(0, V, BLOCK_V):
            v = v0 + tl.arange(0, BLOCK_V)
            x = tl.load(row + v, mask=v < V, other=float("-inf")).to(tl.float32)
            raised = tl.maximum(largest, tl.max(x, axis=0))
            shift = tl.where(raised == float("-inf"), 0.0, raised)
            total = total * tl.exp(largest - shift) + tl.sum(tl.exp(x - shift), axis=0)
            largest = raised
        place = position * N + prompt
        tl.store(shifts + place, tl.where(largest == float("-inf"), 0.0, largest))
        tl.store(scales + place, 1.0 / total)


@triton.jit
def tangent_excess(r):
    """r ln r - r + 1, by its polynomial next to 1, where the terms cancel; 1 at 0, and NaN stays NaN."""
    t = r - 1.0
    p = 2.061928495e-2 - 1.652927452e-2 * t
    p = p * t - 2.357356134e-2
    p = p * t + 3.313428706e-2
    p = p * t - 5.000772598e-2
    p = p * t + 8.333784216e-2
    p = p * t - 1.666665978e-1
    p = p * t + 4.999999841e-1
    return tl.where(tl.abs(t) < 0.3333, t * t * p, tl.where(r > 0.0, r * tl.log(r), 0.0) - t)


@triton.jit
def divergence_kernel(
    logits, prompt_stride, position_stride, weights, shifts, scales, shares, N, V, tiles, BLOCK_V: tl.constexpr
):  # fmt: skip
    position = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for i in range(0, tiles):
        v = (tl.program_id(1) * tiles + i) * BLOCK_V + tl.arange(0, BLOCK_V)
        mean = tl.zeros((BLOCK_V,), dtype=tl.float32)
        excess = tl.zeros((BLOCK_V,), dtype=tl.float32)
        row = logits + position * position_stride
        for prompt in range(0, N):
            weight = tl.load(weights + prompt)
            if weight != 0.0:
                x = tl.load(row + v, mask=v < V, other=float("-inf")).to(tl.float32)
                shift, scale = tl.load(shifts + position * N + prompt), tl.load(scales + position * N + prompt)
                mean += weight * (tl.exp(x - shift) * scale)
            row += prompt_stride
        # A token that is banned in every row has r = 0 and the weight 0.
        inverse = 1.0 / tl.where(mean < 1.17549435e-38, 1.17549435e-38, mean)
        row = logits + position * position_stride
        for prompt in range(0, N):
            weight = tl.load(weights + prompt)
            if weight != 0.0:
                x = tl.load(row + v, mask=v < V, other=float("-inf")).to(tl.float32)
                shift, scale = tl.load(shifts + position * N + prompt), tl.load(scales + position * N + prompt)
                excess += weight * tangent_excess(tl.exp(x - shift) * scale * inverse)
            row += prompt_stride
        total += mean * excess
    tl.store(shares + position * tl.num_programs(1) + tl.program_id(1), tl.sum(total, axis=0))


def sizes(vocabulary):
    """Constants of the launch."""
    return {"BLOCK_V": min(max(triton.next_power_of_2(vocabulary), 128), 1024)}


def js_divergence(logits, weights):
    """Bits [S]; see `lockin_fast.ops.js_divergence`."""
    check_dtype(logits.dtype)
    logits = logits if logits.stride(2) == 1 or logits.shape[2] == 1 else logits.contiguous()
    N, S, V = logits.shape
    if weights is None:
        weights = torch.full((N,), 1 / N, dtype=torch.float32, device=logits.device)
    shifts, scales = (torch.empty((S, N), dtype=torch.float32, device=logits.device) for _ in range(2))
    constants = sizes(V)
    tiles = triton.cdiv(V, constants["BLOCK_V"])
    programs = triton.cdiv(tiles, TILES)
    shares = torch.empty((S, programs), dtype=torch.float32, device=logits.device)
    rows = logits, logits.stride(0), logits.stride(1), weights, shifts, scales
    if S:
        normaliser_kernel[(S, N)](*rows, N, V, **constants, **LAUNCH)
        divergence_kernel[(S, programs)](*rows, shares, N, V, min(tiles, TILES), **constants, **LAUNCH)
    return (shares.double().sum(1) / math.log(2)).float().clamp_(0.0, math.log2(N))
