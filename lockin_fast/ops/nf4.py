"""Rows of hidden states to and from NF4, in bitsandbytes' layout, with outlier channels kept beside the codes."""

import torch

from lockin_fast.dispatch import define
from lockin_fast.kernels.codebook import BOUNDARIES, CODEBOOK, TINY

QUANTIZE_SCHEMA = "(Tensor h, int blocksize, Tensor? channels) -> (Tensor, Tensor, Tensor)"
DEQUANTIZE_SCHEMA = (
    "(Tensor codes, Tensor absmax, Tensor? channels, Tensor? outliers, int blocksize, ScalarType dtype) -> Tensor"
)

BLOCKSIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def quantize_reference(h, blocksize, channels):
    """Plain torch: codes [T, d/2] uint8, absmax [T, d/blocksize] fp32, outliers [T, n] in h's dtype.

    The channels' elements count as 0 in their blocks. A boundary belongs to the lower code; NaN gets the highest.
    """
    tokens, width = h.shape
    work = h.to(torch.float32)
    outliers = h.new_empty((tokens, 0))
    if channels is not None:
        outliers = h.index_select(1, channels)
        work = work.index_fill(1, channels.to(torch.int64), 0.0)
    blocks = work.reshape(tokens, width // blocksize, blocksize)
    absmax = blocks.abs().amax(2)
    scaled = blocks * (1.0 / absmax.clamp_min(TINY))[:, :, None]
    boundaries = torch.tensor(BOUNDARIES, dtype=torch.float32, device=h.device)
    codes = torch.bucketize(scaled, boundaries, out_int32=True).to(torch.uint8).view(tokens, width // 2, 2)
    return codes[:, :, 0] << 4 | codes[:, :, 1], absmax, outliers


def dequantize_reference(codes, absmax, channels, outliers, blocksize, dtype):
    """Plain torch: codebook value times absmax in fp32, rounded to `dtype`; outliers as they were."""
    tokens, width = codes.shape[0], 2 * codes.shape[1]
    index = torch.stack((codes >> 4, codes & 15), 2).to(torch.int64)
    values = torch.tensor(CODEBOOK, dtype=torch.float32, device=codes.device)[index]
    scaled = values.view(tokens, width // blocksize, blocksize) * absmax[:, :, None]
    out = scaled.to(dtype).view(tokens, width)
    return out if channels is None else out.index_copy_(1, channels.to(torch.int64), outliers)


def _fake_quantize(h, blocksize, channels):
    tokens, width = h.shape
    codes = h.new_empty((tokens, width // 2), dtype=torch.uint8)
    absmax = h.new_empty((tokens, width // blocksize), dtype=torch.float32)
    return codes, absmax, h.new_empty((tokens, 0 if channels is None else channels.shape[0]))


def _fake_dequantize(codes, absmax, channels, outliers, blocksize, dtype):
    return codes.new_empty((codes.shape[0], 2 * codes.shape[1]), dtype=dtype)


define("nf4_quantize", QUANTIZE_SCHEMA, quantize_reference, _fake_quantize)
define("nf4_dequantize", DEQUANTIZE_SCHEMA, dequantize_reference, _fake_dequantize)
quantize = torch.ops.lockin_fast.nf4_quantize.default
dequantize = torch.ops.lockin_fast.nf4_dequantize.default
