"""Latents of chosen rows: one tile of tokens and latents a program."""

import torch
import triton
import triton.language as tl

from lockin_fast.kernels.triton._tiles import activate, check_dtype, project, tile_sizes, with_rows

LAUNCH = {"num_warps": 4, "num_stages": 3}


@triton.jit
def encode_kernel(
    h, h_stride, weight, bias, threshold, out, T, K, D, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    latents = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    pre = project(h, h_stride, weight, tokens, tokens < T, latents, K, D, BLOCK_D, BLOCK_T, BLOCK_K, UPCAST)
    pre += tl.load(bias + latents, mask=latents < K, other=0.0)[None, :]
    z = activate(pre, threshold, latents, K)
    tl.store(out + tokens[:, None] * K + latents[None, :], z, mask=(tokens < T)[:, None] & (latents < K)[None, :])


def encode_latents(h, weight, bias, threshold):
    """z [T, K] fp32; see `lockin_fast.encode_latents`."""
    check_dtype(h.dtype)
    h, weight = with_rows(h), weight.contiguous()
    (T, D), K = h.shape, weight.shape[0]
    out = torch.empty((T, K), dtype=torch.float32, device=h.device)
    if out.numel():
        sizes = tile_sizes(T, K, h.dtype)
        grid = triton.cdiv(T, sizes["BLOCK_T"]), triton.cdiv(K, sizes["BLOCK_K"])
        encode_kernel[grid](h, h.stride(0), weight, bias, threshold, out, T, K, D, **sizes, **LAUNCH)
    return out
