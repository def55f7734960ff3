"""The block penalty with its reference hidden state in NF4, decoded a few tokens at a time."""

import torch

from lockin_fast.dispatch import define
from lockin_fast.ops import block_penalty, nf4

SCHEMA = (
    "(Tensor h, Tensor weight, Tensor bias, Tensor sign, Tensor codes, Tensor absmax, Tensor? channels, "
    "Tensor? outliers, Tensor? mask, Tensor? threshold, Tensor? margin, bool mean, int blocksize) "
    "-> (Tensor, Tensor, Tensor)"
)


def reference(h, weight, bias, sign, codes, absmax, channels, outliers, mask, threshold, margin, mean, blocksize):
    """Plain torch: `block_penalty` with h_ref = nf4_dequantize(..., h.dtype), by definition."""
    h_ref = nf4.dequantize_reference(codes, absmax, channels, outliers, blocksize, h.dtype)
    return block_penalty.reference(h, weight, bias, sign, None, h_ref, mask, threshold, margin, mean)


def _fake(h, weight, bias, sign, codes, absmax, channels, outliers, mask, threshold, margin, mean, blocksize):
    return block_penalty._fake(h, weight, bias, sign, None, None, mask, threshold, margin, mean)


define("block_penalty_nf4", SCHEMA, reference, _fake)
op = torch.ops.lockin_fast.block_penalty_nf4.default
