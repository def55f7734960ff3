"""The block penalty: a tile of tokens a program, all its latents in turn, the reference encoded by the same code."""

import torch
import triton
import triton.language as tl

from lockin_fast.kernels.triton._tiles import activate, check_dtype, count_positive, project, tile_sizes, with_rows

LAUNCH = {"num_warps": 4, "num_stages": 3}


@triton.jit
def penalty_kernel(
    h, h_stride, weight, bias, sign, z_ref, h_ref, h_ref_stride, mask, threshold, margin, per_token, coefficient,
    active, T, K, D, share, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
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
        place = tokens[:, None] * K + latents[None, :]
        if some:
            b = tl.load(bias + latents, mask=real, other=0.0)[None, :]
            s = tl.load(sign + latents, mask=real, other=0.0)[None, :]
            pre = b + project(h, h_stride, weight, tokens, keep, latents, K, D, BLOCK_D, BLOCK_T, BLOCK_K, UPCAST)
            z = activate(pre, threshold, latents, K)
            if h_ref is not None:
                ref = b + project(
                    h_ref, h_ref_stride, weight, tokens, keep, latents, K, D, BLOCK_D, BLOCK_T, BLOCK_K, UPCAST
                )
                ref = activate(ref, threshold, latents, K)
            else:
                ref = tl.load(z_ref + place, mask=pair, other=0.0)
            excess = s * (z - ref)
            if margin is not None:
                excess -= tl.load(margin + latents, mask=real, other=0.0)[None, :]
            excess = tl.where(pair, tl.where(excess <= 0.0, 0.0, excess), 0.0)
            penalty += tl.sum(excess * excess, axis=1)
            pairs += count_positive(excess, 1)
            value = tl.where(z == 0.0, 0.0, excess * s * (2.0 * share))
        tl.store(coefficient + place, value, mask=inside[:, None] & real[None, :])
    tl.store(per_token + tokens, penalty * share, mask=inside)
    tl.store(active + tl.program_id(0), tl.sum(pairs))


def block_penalty(h, weight, bias, sign, z_ref, h_ref, mask, threshold, margin, mean):
    """per_token [T], coefficient [T, K], active pairs; see `lockin_fast.block_penalty`."""
    check_dtype(h.dtype)
    h, h_ref, weight = with_rows(h), with_rows(h_ref), weight.contiguous()
    (T, D), K = h.shape, weight.shape[0]
    keep = None if mask is None else mask.view(torch.uint8)  # bytes load in wide words, booleans through the stack
    per_token = torch.empty((T,), dtype=torch.float32, device=h.device)
    coefficient = torch.empty((T, K), dtype=torch.float32, device=h.device)
    if not coefficient.numel():
        return per_token.zero_(), coefficient, torch.zeros((), dtype=torch.int64, device=h.device)
    sizes = tile_sizes(T, K, h.dtype)
    tiles = triton.cdiv(T, sizes["BLOCK_T"])
    active = torch.empty((tiles,), dtype=torch.int32, device=h.device)
    h_ref_stride = 0 if h_ref is None else h_ref.stride(0)
    penalty_kernel[(tiles,)](
        h, h.stride(0), weight, bias, sign, z_ref, h_ref, h_ref_stride, keep, threshold, margin, per_token, coefficient,
        active, T, K, D, 1.0 / K if mean else 1.0, **sizes, **LAUNCH,
    )  # fmt: skip
    return per_token, coefficient, active.sum()
