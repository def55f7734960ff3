"""The block penalty: a tile of tokens a program, all its latents in turn, the reference encoded by the same code."""

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


@triton.jit
def penalty_kernel(
    h, h_stride, weight, bias, sign, z_ref, to_ref, ref_stride, mask, threshold, margin, per_token, coefficient,
    active, T, K, D, share, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    tokens = first + tl.arange(0, BLOCK_T)
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
        value = tl.zeros((BLOCK_K, BLOCK_T), dtype=tl.float32)
        pair = real[:, None] & keep[None, :]
        place = tokens[None, :] * K + latents[:, None]
        if some:
            pre, pre_ref = project(
                h, h_stride, to_ref, ref_stride, weight, first, keep, latents, K, D, BLOCK_T, BLOCK_K, BLOCK_D, UPCAST
            )
            b = tl.load(bias + latents, mask=real, other=0.0)[:, None]
            s = tl.load(sign + latents, mask=real, other=0.0)[:, None]
            floor = floor_of(threshold, latents, K)[:, None]
            z = activate(b + pre, floor)
            if to_ref is not None:
                ref = activate(b + pre_ref, floor)
            else:
                ref = tl.load(z_ref + place, mask=pair, other=0.0)
            excess = s * (z - ref)
            if margin is not None:
                excess -= tl.load(margin + latents, mask=real, other=0.0)[:, None]
            excess = tl.where(pair, tl.where(excess <= 0.0, 0.0, excess), 0.0)
            penalty += tl.sum(excess * excess, axis=0)
            pairs += count_positive(excess, 0)
            value = tl.where(z == 0.0, 0.0, excess * s * (2.0 * share))
        tl.store(coefficient + place, value, mask=real[:, None] & inside[None, :])
    tl.store(per_token + tokens, penalty * share, mask=inside)
    tl.store(active + tl.program_id(0), tl.sum(pairs))


def block_penalty(h, weight, bias, sign, z_ref, h_ref, mask, threshold, margin, mean):
    """per_token [T], coefficient [T, K], active pairs; see `lockin_fast.block_penalty`."""
    check_dtype(h.dtype)
    h, h_ref, weight, keep = with_rows(h), with_rows(h_ref), weight.contiguous(), as_bytes(mask)
    (T, D), K = h.shape, weight.shape[0]
    per_token = torch.empty((T,), dtype=torch.float32, device=h.device)
    coefficient = torch.empty((T, K), dtype=torch.float32, device=h.device)
    if not coefficient.numel():
        return per_token.zero_(), coefficient, torch.zeros((), dtype=torch.int64, device=h.device)
    to_ref, ref_stride = distance(h, h_ref), 0 if h_ref is None else h_ref.stride(0)

    def run(sizes):
        tiles = triton.cdiv(T, sizes["BLOCK_T"])
        active = torch.empty((tiles,), dtype=torch.int32, device=h.device)
        penalty_kernel[(tiles,)](
            h, h.stride(0), weight, bias, sign, z_ref, to_ref, ref_stride, keep, threshold, margin, per_token,
            coefficient, active, T, K, D, 1.0 / K if mean else 1.0, **sizes,
        )  # fmt: skip
        return active

    which = "block_penalty z_ref" if h_ref is None else "block_penalty h_ref"
    active = run(_configs.narrow(which, h, K, run))
    return per_token, coefficient, active.sum()
