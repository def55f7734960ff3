"""What a patch would change: the norm of the difference and what K latents see of it, without storing it."""

from typing import NamedTuple

import torch

from lockin_fast.dispatch import define
from lockin_fast.ops import _checks
from lockin_fast.ops.encode_latents import inactive
from lockin_fast.ops.nf4_tensor import NF4Tensor

SCHEMA = (
    "(Tensor h, Tensor rows, Tensor source, Tensor weight, Tensor? bias, Tensor? threshold) -> (Tensor, Tensor, Tensor)"
)
BLOCK_ELEMENTS = 2**18  # of the positions held at a time: 1 MB in fp32
DECODED_ELEMENTS = 2**20  # of an NF4 source decoded at a time: 2 MB in 16 bits


class PatchDiff(NamedTuple):
    """Of every patched position, with diff = source - h: what the patch changes."""

    norm: torch.Tensor  # [P] fp32, ||diff||
    projection: torch.Tensor  # [P, K] fp32, diff W^T: the change of the pre-activations
    latents: torch.Tensor | None  # [P, K] fp32, z(source) - z(h): the change of the latents; None without a bias


def reference(h, rows, source, weight, bias, threshold):
    """Plain torch in blocks of positions. Rows outside [0, N) give NaN."""
    positions, latents = rows.shape[0], weight.shape[0]
    work = torch.promote_types(h.dtype, torch.float32)
    norm = torch.empty(positions, dtype=work, device=h.device)
    projection = torch.empty((positions, latents), dtype=work, device=h.device)
    change = torch.empty((positions, latents) if bias is not None else (0, 0), dtype=work, device=h.device)
    inside = (rows >= 0) & (rows < h.shape[0])
    picked = torch.where(inside, rows, 0)
    columns = weight.to(work).t()
    size = max(BLOCK_ELEMENTS // max(weight.shape[1], 1), 1)
    for start in range(0, positions if h.shape[0] else 0, size):
        part = slice(start, start + size)
        before = h[picked[part]].to(work)
        diff = source[part].to(work) - before
        norm[part] = torch.linalg.vector_norm(diff, dim=1, dtype=torch.float64)  # squares leave fp32's range
        with torch.autocast(h.device.type, enabled=False):
            torch.mm(diff, columns, out=projection[part])
            if bias is not None:
                pre = torch.addmm(bias.to(work), before, columns)
                after = pre + projection[part]
                off, off_after = inactive(pre, threshold), inactive(after, threshold)
                change[part] = after.masked_fill_(off_after, 0.0) - pre.masked_fill_(off, 0.0)
    outside = ~inside
    change = change if bias is None else change.masked_fill_(outside[:, None], torch.nan)
    return norm.masked_fill_(outside, torch.nan), projection.masked_fill_(outside[:, None], torch.nan), change


def _fake(h, rows, source, weight, bias, threshold):
    dtype = torch.promote_types(h.dtype, torch.float32)
    shape = rows.shape[0], weight.shape[0]
    return tuple(h.new_empty(s, dtype=dtype) for s in (shape[:1], shape, (0, 0) if bias is None else shape))


define("patch_diff", SCHEMA, reference, _fake)
_op = torch.ops.lockin_fast.patch_diff.default


@torch.no_grad()
def patch_diff(h, positions, source, weight, bias=None, *, threshold=None):
    """Norm of source - h at listed positions, and what K latents would see of the patch.

        diff       = source - h[row, pos]
        norm       = ||diff||_2;      projection = diff W^T
        latents    = z(source) - z(h[row, pos]),  z(x) = relu(x W^T + b) * (x W^T + b > threshold)

    Arguments
        h: hidden states [B, S, d] or [N, d], float32, float16 or bfloat16.
        positions: int64 [P, 2] of (row, position), or [P] flat tokens, row * S + position.
        source: [P, d], cast to h's dtype; or an NF4Tensor [P, d], decoded a block at a time.
        weight: rows [K, d], encoder rows or any directions; cast to h's dtype.
        bias: [K]; without one `latents` is None and its product is not made. (It cancels in the projection.)
        threshold: JumpReLU thresholds [K], for `latents`; None is a plain ReLU.

    Returns `PatchDiff(norm [P], projection [P, K], latents [P, K] or None)`, float32, products accumulated in float32;
    the projection is of the difference, so nothing cancels where source is close to h. No gradient. NaN and Inf
    propagate.

    Raises TypeError or ValueError, before any work, for a wrong dtype, shape or device, and on the CPU for a position
    outside of h; on other devices its results are NaN.

    Costs one read of the P rows of h and of source, and 2 P d K FLOPs, twice that with a bias.
    """
    _checks.stream(h, "[B, S, d]", "[N, d]")
    rows = _checks.positions(positions, h)
    packed = isinstance(source, NF4Tensor)
    source = _checks.nf4_source(source, rows.shape[0], h) if packed else _checks.source(source, rows.shape[0], h)
    count = _checks.directions("weight", weight, h)
    _checks.per_latent("bias", bias, count, optional=True)
    _checks.per_latent("threshold", threshold, count, optional=True)
    if threshold is not None and bias is None:
        raise ValueError("threshold: got one without a bias, expected both; the threshold is for the latents alone")
    _checks.same_device(h, weight=weight, bias=bias, threshold=threshold)
    tokens = _checks.hidden("h", h, h.shape[-1])
    weight, bias, threshold = _checks.rows_like(weight, h), _checks.fp32(bias), _checks.fp32(threshold)
    arguments = weight, bias, threshold
    results = _by_blocks(tokens, rows, source, *arguments) if packed else _op(tokens, rows, source, *arguments)
    return PatchDiff(*results[:2], None if bias is None else results[2])


def _by_blocks(tokens, rows, source, weight, bias, threshold):
    """The op on some positions after others, so that only a part of the source is ever held decoded."""
    size = max(DECODED_ELEMENTS // max(tokens.shape[1], 1), 1)
    blocks = [slice(start, start + size) for start in range(0, max(rows.shape[0], 1), size)]
    parts = [
        _op(tokens, rows[part], source.rows(part).dequantize(tokens.dtype), weight, bias, threshold) for part in blocks
    ]
    return tuple(torch.cat(results) for results in zip(*parts, strict=True))
