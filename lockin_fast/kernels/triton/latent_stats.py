"""Sums over tokens of every latent: a program owns a tile of latents and a share of the tokens, and writes once.

The product is taken as W h^T: a thread then holds many tokens of few latents, and sums them without its neighbours.
"""

import torch
import triton
import triton.language as tl

from lockin_fast.kernels.triton import _configs
from lockin_fast.kernels.triton._tiles import (
    activate,
    as_bytes,
    check_dtype,
    count_positive,
    distance,
    floor_of,
    project,
    with_rows,
)

SHARES = 16  # at most, for a whole SAE: what they write is [shares, F]


@triton.jit
def _add_both(a, a_squares, b, b_squares):
    return a + b, a_squares + b_squares


@triton.jit
def stats_kernel(
    h, h_stride, to_ref, ref_stride, weight, bias, threshold, mask, sums, squares, counts, counts_ref, T, K, D, tiles,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # The shares of one tile of latents run together and read its weight from the L2.
    share = tl.program_id(0)
    latents = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    real = latents < K
    b = tl.load(bias + latents, mask=real, other=0.0)[:, None]
    floor = floor_of(threshold, latents, K)[:, None]
    total = tl.zeros((BLOCK_K,), dtype=tl.float64)
    total_squares = tl.zeros((BLOCK_K,), dtype=tl.float64)
    count = tl.zeros((BLOCK_K,), dtype=tl.int32)
    count_ref = tl.zeros((BLOCK_K,), dtype=tl.int32)
    first = share.to(tl.int64) * tiles * BLOCK_T
    for i in range(0, tiles):
        start = first + i * BLOCK_T
        tokens = start + tl.arange(0, BLOCK_T)
        keep = tokens < T
        if mask is not None:
            keep = keep & (tl.load(mask + tokens, mask=keep, other=0) != 0)
        if tl.sum(keep.to(tl.int32)) > 0:
            pre, pre_ref = project(
                h, h_stride, to_ref, ref_stride, weight, start, keep, latents, K, D, BLOCK_T, BLOCK_K, BLOCK_D, UPCAST
            )
            z = tl.where(keep[None, :], activate(b + pre, floor), 0.0)
            count += count_positive(z, 1)
            if to_ref is not None:
                other = tl.where(keep[None, :], activate(b + pre_ref, floor), 0.0)
                count_ref += count_positive(other, 1)
                z -= other
            wide = z.to(tl.float64)
            found, found_squares = tl.reduce((wide, wide * wide), 1, _add_both)
            total += found
            total_squares += found_squares
    place = share.to(tl.int64) * K + latents
    tl.store(sums + place, total, mask=real)
    tl.store(squares + place, total_squares, mask=real)
    tl.store(counts + place, count, mask=real)
    if to_ref is not None:
        tl.store(counts_ref + place, count_ref, mask=real)


def latent_stats(h, weight, bias, h_ref, threshold, mask):
    """Sums, squares, counts, reference counts [K] and tokens; see `lockin_fast.latent_stats`."""
    check_dtype(h.dtype)
    h, h_ref, weight, keep = with_rows(h), with_rows(h_ref), weight.contiguous(), as_bytes(mask)
    (T, D), K = h.shape, weight.shape[0]
    to_ref, ref_stride = distance(h, h_ref), 0 if h_ref is None else h_ref.stride(0)

    def run(sizes):
        latent_tiles, token_tiles = triton.cdiv(K, sizes["BLOCK_K"]), max(triton.cdiv(T, sizes["BLOCK_T"]), 1)
        enough = triton.cdiv(2 * _configs.chip(h.device).processors, max(latent_tiles, 1))
        tiles = triton.cdiv(token_tiles, min(token_tiles, max(SHARES, enough)))
        shares = triton.cdiv(token_tiles, tiles)
        sums, squares = (torch.empty((shares, K), dtype=torch.float64, device=h.device) for _ in range(2))
        counts = torch.empty((shares, K), dtype=torch.int32, device=h.device)
        counts_ref = None if h_ref is None else torch.empty_like(counts)
        if K:
            stats_kernel[(shares, latent_tiles)](
                h, h.stride(0), to_ref, ref_stride, weight, bias, threshold, keep, sums, squares, counts, counts_ref,
                T, K, D, tiles, **sizes,
            )  # fmt: skip
        return sums, squares, counts, counts_ref

    which = "stats" if h_ref is None else "stats of two"
    sums, squares, counts, counts_ref = run(_configs.wide(which, h, K, run))
    tokens = torch.full((), T, dtype=torch.int64, device=h.device) if mask is None else mask.sum()
    count_ref = counts.new_zeros(0, dtype=torch.int64) if h_ref is None else counts_ref.sum(0)
    return sums.sum(0), squares.sum(0), counts.sum(0), count_ref, tokens
