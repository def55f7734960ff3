"""Sums over tokens of every latent: a program owns a tile of latents and a share of the tokens, and writes once."""

import torch
import triton
import triton.language as tl

from lockin_fast.kernels.triton._tiles import INTERPRETING, activate, check_dtype, count_positive, project, with_rows

LAUNCH = {"num_warps": 8, "num_stages": 3}


@triton.jit
def stats_kernel(
    h, h_stride, h_ref, h_ref_stride, weight, bias, threshold, mask, sums, squares, counts, counts_ref, T, K, D, tiles,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    latents = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    real = latents < K
    b = tl.load(bias + latents, mask=real, other=0.0)[None, :]
    total = tl.zeros((BLOCK_K,), dtype=tl.float64)
    total_squares = tl.zeros((BLOCK_K,), dtype=tl.float64)
    count = tl.zeros((BLOCK_K,), dtype=tl.int32)
    count_ref = tl.zeros((BLOCK_K,), dtype=tl.int32)
    first = tl.program_id(1).to(tl.int64) * tiles * BLOCK_T
    for i in range(0, tiles):
        tokens = first + i * BLOCK_T + tl.arange(0, BLOCK_T)
        keep = tokens < T
        if mask is not None:
            keep = keep & (tl.load(mask + tokens, mask=keep, other=0) != 0)
        if tl.sum(keep.to(tl.int32)) > 0:
            pre = b + project(h, h_stride, weight, tokens, keep, latents, K, D, BLOCK_D, BLOCK_T, BLOCK_K, UPCAST)
            z = tl.where(keep[:, None], activate(pre, threshold, latents, K), 0.0)
            count += count_positive(z, 0)
            if h_ref is not None:
                pre = b + project(
                    h_ref, h_ref_stride, weight, tokens, keep, latents, K, D, BLOCK_D, BLOCK_T, BLOCK_K, UPCAST
                )
                other = tl.where(keep[:, None], activate(pre, threshold, latents, K), 0.0)
                count_ref += count_positive(other, 0)
                z -= other
            wide = z.to(tl.float64)
            total += tl.sum(wide, axis=0)
            total_squares += tl.sum(wide * wide, axis=0)
    place = tl.program_id(1).to(tl.int64) * K + latents
    tl.store(sums + place, total, mask=real)
    tl.store(squares + place, total_squares, mask=real)
    tl.store(counts + place, count, mask=real)
    if h_ref is not None:
        tl.store(counts_ref + place, count_ref, mask=real)


def sizes(dtype):
    """Constants of the launch."""
    return {"BLOCK_T": 64, "BLOCK_K": 64, "BLOCK_D": 32 if dtype == torch.float32 else 64, "UPCAST": INTERPRETING}


def latent_stats(h, weight, bias, h_ref, threshold, mask):
    """Sums, squares, counts, reference counts [K] and tokens; see `lockin_fast.latent_stats`."""
    check_dtype(h.dtype)
    h, h_ref, weight = with_rows(h), with_rows(h_ref), weight.contiguous()
    (T, D), K = h.shape, weight.shape[0]
    keep = None if mask is None else mask.view(torch.uint8)  # bytes load in wide words, booleans through the stack
    constants = sizes(h.dtype)
    token_tiles = max(triton.cdiv(T, constants["BLOCK_T"]), 1)
    shares = min(16, token_tiles)
    tiles = triton.cdiv(token_tiles, shares)
    sums, squares = (torch.empty((shares, K), dtype=torch.float64, device=h.device) for _ in range(2))
    counts = torch.empty((shares, K), dtype=torch.int64, device=h.device)
    counts_ref = None if h_ref is None else torch.empty_like(counts)
    if K:
        stats_kernel[(triton.cdiv(K, constants["BLOCK_K"]), shares)](
            h, h.stride(0), h_ref, 0 if h_ref is None else h_ref.stride(0), weight, bias, threshold, keep, sums,
            squares, counts, counts_ref, T, K, D, tiles, **constants, **LAUNCH,
        )  # fmt: skip
    tokens = torch.full((), T, dtype=torch.int64, device=h.device) if mask is None else mask.sum()
    count_ref = counts.new_zeros(0) if h_ref is None else counts_ref.sum(0)
    return sums.sum(0), squares.sum(0), counts.sum(0), count_ref, tokens
