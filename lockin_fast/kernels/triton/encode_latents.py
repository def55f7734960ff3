"""Latents of chosen rows, or of all: one tile of tokens and latents a program."""

import torch
import triton
import triton.language as tl

from lockin_fast.kernels.triton import _configs
from lockin_fast.kernels.triton._tiles import activate, check_dtype, floor_of, grouped, project, with_rows


@triton.jit
def encode_kernel(
    h, h_stride, weight, bias, threshold, out, out_stride, T, K, D, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row, column = grouped(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(K, BLOCK_K), 16)
    first = row.to(tl.int64) * BLOCK_T
    tokens, latents = first + tl.arange(0, BLOCK_T), column * BLOCK_K + tl.arange(0, BLOCK_K)
    inside, real = tokens < T, latents < K
    pre, _ = project(h, h_stride, None, 0, weight, first, inside, latents, K, D, BLOCK_T, BLOCK_K, BLOCK_D, UPCAST)
    pre += tl.load(bias + latents, mask=real, other=0.0)[:, None]
    z = activate(pre, floor_of(threshold, latents, K)[:, None])
    place = tl.arange(0, BLOCK_T)[None, :] * out_stride + latents[:, None]  # from the tile's first row: 32 bits hold it
    tl.store(out + first * out_stride + place, z, mask=inside[None, :] & real[:, None])


def encode_into(out, h, weight, bias, threshold):
    """Write z into `out` [T, K], whose rows may lie apart."""
    (T, D), K = h.shape, weight.shape[0]

    def run(sizes):
        tiles = triton.cdiv(T, sizes["BLOCK_T"]) * triton.cdiv(K, sizes["BLOCK_K"])
        encode_kernel[(tiles,)](h, h.stride(0), weight, bias, threshold, out, out.stride(0), T, K, D, **sizes)

    if out.numel():
        wide = K > _configs.WIDE_LATENTS
        run(_configs.wide("encode", h, K, run) if wide else _configs.narrow("encode_latents", h, K, run))
    return out


def encode_latents(h, weight, bias, threshold):
    """z [T, K] fp32; see `lockin_fast.encode_latents`."""
    check_dtype(h.dtype)
    out = torch.empty((h.shape[0], weight.shape[0]), dtype=torch.float32, device=h.device)
    return encode_into(out, with_rows(h), weight.contiguous(), bias, threshold)
