"""Activation patching: listed tokens of a hidden state are written over with others, dense or NF4."""

import torch

from lockin_fast.dispatch import define, detour
from lockin_fast.ops import _checks
from lockin_fast.ops.nf4 import dequantize
from lockin_fast.ops.nf4_tensor import NF4Tensor

SCHEMA = "(Tensor(a!) h, Tensor rows, Tensor source) -> ()"
NF4_SCHEMA = (
    "(Tensor(a!) h, Tensor rows, Tensor codes, Tensor absmax, Tensor? channels, Tensor? outliers, int blocksize) -> ()"
)


def reference(h, rows, source):
    """Plain torch: h [N, d], rows [P], source [P, d] of h's dtype. Rows outside [0, N) are skipped, everywhere."""
    inside = (rows >= 0) & (rows < h.shape[0])
    h[rows[inside]] = source[inside]


def reference_nf4(h, rows, codes, absmax, channels, outliers, blocksize):
    """As `reference`, of rows in NF4; outliers [P, n] of h's dtype."""
    reference(h, rows, dequantize(codes, absmax, channels, outliers, blocksize, h.dtype))


def _fake(h, rows, source):
    pass


def _fake_nf4(h, rows, codes, absmax, channels, outliers, blocksize):
    pass


define("patch_", SCHEMA, reference, _fake)
define("patch_nf4_", NF4_SCHEMA, reference_nf4, _fake_nf4)
for device in ("cpu", "cuda"):
    for op in ("patch_", "patch_nf4_"):
        detour(op, device, "wanted gradients and an h without a flat view go to stock torch")
_op = torch.ops.lockin_fast.patch_.default
_op_nf4 = torch.ops.lockin_fast.patch_nf4_.default


def patch_(h, positions, source):
    """h[row, pos] <- source for listed positions, in place.

    Arguments
        h: hidden states [B, S, d] or [N, d], float32, float16 or bfloat16.
        positions: int64 [P, 2] of (row, position), or [P] flat tokens, row * S + position. From a mask: mask.nonzero().
            Which source wins a position that is listed twice is not promised.
        source: [P, d], cast to h's dtype; it may be expanded from one row, and a part of h is copied first. Or an
            NF4Tensor [P, d], which is decoded where it is written.

    Returns h. Where gradients are wanted the patch is stock torch's `index_put_`: none flows to what h held at the
    patched positions, and source gets its own.

    Raises TypeError or ValueError, before any work, for a wrong dtype, shape or device, for an h that is expanded or a
    leaf that requires grad, and on the CPU for a position outside of h; on other devices such a position is skipped.

    Costs one read of source and one write of the rows.

    Activation patching as in Vig et al., arXiv 2004.12265, and Meng et al., arXiv 2202.05262.
    """
    _checks.stream(h, "[B, S, d]", "[N, d]")
    _checks.writable(h)
    rows = _checks.positions(positions, h)
    packed = isinstance(source, NF4Tensor)
    source = _checks.nf4_source(source, rows.shape[0], h) if packed else _checks.source(source, rows.shape[0], h)
    wants_grad = torch.is_grad_enabled() and (h.requires_grad or (not packed and source.requires_grad))
    tokens = None if wants_grad else _flat(h)
    if tokens is None:
        source = source.dequantize(h.dtype) if packed else source
        return h.index_put_((rows,) if h.dim() == 2 else (rows // h.shape[1], rows % h.shape[1]), source)
    if not packed and not torch.compiler.is_compiling() and torch._C._is_alias_of(source, h):
        source = source.clone()  # rows are written in no order, and would be read after they were
    if packed:
        _op_nf4(tokens, rows, *source.operands(h.dtype))
    else:
        _op(tokens, rows, source)
    torch.autograd.graph.increment_version(h)
    return h


def _flat(h):
    """h [B, S, d] as tokens [N, d] that share its memory, d contiguous; None where there is no such view."""
    if h.shape[-1] > 1 and h.stride(-1) != 1:
        return None
    if h.dim() == 2:
        return h
    if h.shape[0] > 1 and h.shape[1] > 1 and h.stride(0) != h.shape[1] * h.stride(1):
        return None
    return h.view(h.shape[:-1].numel(), h.shape[-1])
