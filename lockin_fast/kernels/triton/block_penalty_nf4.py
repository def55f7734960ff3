"""The block penalty against a reference in NF4, decoded in registers: a tile of tokens a program."""

import torch
import triton
import triton.language as tl

from lockin_fast.kernels.triton._tiles import (
    INTERPRETING,
    activate,
    as_bytes,
    check_dtype,
    count_positive,
    floor_of,
    with_rows,
)
from lockin_fast.kernels.triton.nf4 import value_of


@triton.jit
def decode(
    codes, absmax, channels, outliers, tokens, keep, d0, D, N, SIZE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Columns d0 to d0 + BLOCK_D of the reference, which lie in one block of each row, in fp32."""
    half = tl.arange(0, BLOCK_D // 2)[None, :]
    packed = tl.load(codes + tokens[:, None] * (D // 2) + d0 // 2 + half, mask=keep[:, None], other=0)
    scale = tl.load(absmax + tokens * (D // SIZE) + d0 // SIZE, mask=keep, other=0.0)
    x = value_of(tl.reshape(tl.join(packed >> 4, packed), (BLOCK_T, BLOCK_D))) * scale[:, None]
    if channels is not None:
        d = d0 + tl.arange(0, BLOCK_D)[None, :]
        for j in range(0, N):
            channel = tl.load(channels + j)
            if channel >= d0 and channel < d0 + BLOCK_D:
                kept = tl.load(outliers + tokens * N + j, mask=keep, other=0.0).to(tl.float32)
                x = tl.where(d == channel, kept[:, None], x)
    return x


@triton.jit
def penalty_kernel(
    h, h_stride, weight, bias, sign, codes, absmax, channels, outliers, mask, threshold, margin, per_token, coefficient,
    active, T, K, D, N, share, SIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < T
    keep = inside
    if mask is not None:
        keep = inside & (tl.load(mask + tokens, mask=inside, other=0) != 0)
    penalty = tl.zeros((BLOCK_T,), dtype=tl.float32)
    pairs = tl.zeros((BLOCK_T,), dtype=tl.int32)
    some = tl.sum(keep.to(tl.int32)) > 0
    for k0 in range(0, K, BLOCK_K):
        latents = k0 + tl.arange(0, BLOCK_K)
        real = latents < K
        value = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
        pair = keep[:, None] & real[None, :]
        if some:
            pre = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
            pre_ref = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
            for d0 in range(0, D, BLOCK_D):
                d = d0 + tl.arange(0, BLOCK_D)
                x = tl.load(h + tokens[:, None] * h_stride + d[None, :], mask=keep[:, None], other=0.0)
                place = weight + latents.to(tl.int64)[None, :] * D + d[:, None]
                w = tl.load(place, mask=real[None, :], other=0.0)
                ref = decode(codes, absmax, channels, outliers, tokens, keep, d0, D, N, SIZE, BLOCK_T, BLOCK_D)
                ref = ref.to(x.dtype)  # rounded like a dense reference
                if UPCAST:
                    x, w, ref = x.to(tl.float32), w.to(tl.float32), ref.to(tl.float32)
                pre = tl.dot(x, w, pre, input_precision="ieee")
                pre_ref = tl.dot(ref, w, pre_ref, input_precision="ieee")
            b = tl.load(bias + latents, mask=real, other=0.0)[None, :]
            s = tl.load(sign + latents, mask=real, other=0.0)[None, :]
            floor = floor_of(threshold, latents, K)[None, :]
            z = activate(b + pre, floor)
            z_ref = activate(b + pre_ref, floor)
            excess = s * (z - z_ref)
            if margin is not None:
                excess -= tl.load(margin + latents, mask=real, other=0.0)[None, :]
            excess = tl.where(pair, tl.where(excess <= 0.0, 0.0, excess), 0.0)
            penalty += tl.sum(excess * excess, axis=1)
            pairs += count_positive(excess, 1)
            value = tl.where(z == 0.0, 0.0, excess * s * (2.0 * share))
        out = coefficient + tokens[:, None] * K + latents[None, :]
        tl.store(out, value, mask=inside[:, None] & real[None, :])
    tl.store(per_token + tokens, penalty * share, mask=inside)
    tl.store(active + tl.program_id(0), tl.sum(pairs))


def sizes(latents, blocksize, dtype):
    """Constants of the launch; a tile's columns lie in one block, so that a token has one scale."""
    return {
        "SIZE": blocksize,
        "BLOCK_T": 32,
        "BLOCK_K": min(max(triton.next_power_of_2(latents), 16), 64),
        "BLOCK_D": min(blocksize, 32 if dtype == torch.float32 else 64),
        "UPCAST": INTERPRETING,
        "num_warps": 8 if dtype == torch.float32 else 4,  # fp32 products hold their operands in registers
        "num_stages": 3,
    }


def block_penalty_nf4(
    h, weight, bias, sign, codes, absmax, channels, outliers, mask, threshold, margin, mean, blocksize
):  # fmt: skip
    """per_token [T], coefficient [T, K], active pairs; see `lockin_fast.block_penalty`."""
    check_dtype(h.dtype)
    h, weight, keep = with_rows(h), weight.contiguous(), as_bytes(mask)
    codes, absmax = codes.contiguous(), absmax.contiguous()
    (T, D), K = h.shape, weight.shape[0]
    count = 0 if channels is None else channels.shape[0]
    kept = (channels, outliers.contiguous()) if count else (None, None)
    per_token = torch.empty((T,), dtype=torch.float32, device=h.device)
    coefficient = torch.empty((T, K), dtype=torch.float32, device=h.device)
    if not coefficient.numel():
        return per_token.zero_(), coefficient, torch.zeros((), dtype=torch.int64, device=h.device)
    constants = sizes(K, blocksize, h.dtype)
    tiles = triton.cdiv(T, constants["BLOCK_T"])
    active = torch.empty((tiles,), dtype=torch.int32, device=h.device)
    penalty_kernel[(tiles,)](
        h, h.stride(0), weight, bias, sign, codes, absmax, *kept, keep, threshold, margin, per_token, coefficient,
        active, T, K, D, count, 1.0 / K if mean else 1.0, **constants,
    )  # fmt: skip
    return per_token, coefficient, active.sum()
