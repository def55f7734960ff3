"""`latent_stats` of many segments of consecutive tokens at once, the sums apart for each: a prompt is a segment.

A call for each segment would read the whole weight as often; here it is read once. Only the compiled part gains by
that: elsewhere the reference, which makes those calls, is the kernel.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lockin_fast.dispatch import define, stock
from lockin_fast.ops import _checks, _wide
from lockin_fast.ops.latent_stats import LatentStats

SCHEMA = (
    "(Tensor h, Tensor weight, Tensor bias, Tensor? h_ref, Tensor? threshold, Tensor ends) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


class SegmentStats(NamedTuple):
    """`sums` [S, F] fp64: of every segment over its tokens; `total`: the statistics over all tokens."""

    sums: torch.Tensor
    total: LatentStats


def reference(h, weight, bias, h_ref, threshold, ends):
    """One segment after the other. `ends` is on the CPU: nothing waits for a device."""
    latents = weight.shape[0]
    sums = h.new_zeros((ends.shape[0], latents), dtype=torch.float64)
    squares = h.new_zeros((latents,), dtype=torch.float64)
    counts = h.new_zeros((latents,), dtype=torch.int64)
    counts_ref = counts.new_zeros((0 if h_ref is None else latents,))
    start = 0
    for row, end in zip(sums, ends.tolist(), strict=True):
        part = slice(start, end)
        other = None if h_ref is None else h_ref[part]
        stats = torch.ops.lockin_fast.latent_stats.default(h[part], weight, bias, other, threshold, None)
        row.copy_(stats[0])
        for total, found in zip((squares, counts, counts_ref), stats[1:4], strict=True):
            total += found
        start = end
    return sums, squares, counts, counts_ref


def _fake(h, weight, bias, h_ref, threshold, ends):
    latents = weight.shape[0]
    counts = [h.new_empty((n,), dtype=torch.int64) for n in (latents, 0 if h_ref is None else latents)]
    shapes = ((ends.shape[0], latents), (latents,))
    return *(h.new_empty(shape, dtype=torch.float64) for shape in shapes), *counts


define("segment_stats", SCHEMA, reference, _fake)
stock("segment_stats", "stock torch matrix products over tiles are as fast below AVX-512")
_op = torch.ops.lockin_fast.segment_stats.default


@torch.no_grad()
def segment_stats(h, weight, bias, lengths: Sequence[int], *, h_ref=None, threshold=None) -> SegmentStats:
    """Sums of every latent over each of S segments of the tokens, and `latent_stats` of all tokens; never [T, F].

        sums[s] = sum over the tokens of segment s of z, or of z - z_ref        with z as in `latent_stats`

    Arguments
        h: hidden states [T, d], float32, float16 or bfloat16: the first lengths[0] tokens are the first segment, the
            next lengths[1] the second, and so on.
        weight, bias, h_ref, threshold: as in `latent_stats`; h_ref is a tensor or None.
        lengths: tokens of each segment, 0 or more, T in all.

    Raises TypeError or ValueError, before any work, for a wrong dtype, shape or device, or lengths that are not T.

    Costs what `latent_stats` of the T tokens costs, and 8 bytes for each segment and latent.
    """
    latents = _checks.rows(weight, bias)
    tokens = _checks.hidden("h", h, weight.shape[1])
    if h_ref is not None:
        _checks.tensor("h_ref", h_ref, "of the shape and dtype of h, or None")
        h_ref = _checks.reference(h_ref, h)
    _checks.per_latent("threshold", threshold, latents, optional=True)
    _checks.same_device(h, weight=weight, bias=bias, h_ref=h_ref, threshold=threshold)
    bias, threshold = _checks.fp32(bias), _checks.fp32(threshold)
    if any(length < 0 for length in lengths) or sum(lengths) != len(tokens):
        raise ValueError(
            f"lengths: got {len(lengths)} lengths of {sum(lengths)} tokens in all, the least "
            f"{min(lengths, default=0)}; expected 0 or more each and {len(tokens)} in all, as h is {tuple(h.shape)}"
        )
    ends = torch.tensor(list(lengths), dtype=torch.int64, device="cpu").cumsum(0)
    parts = [
        _op(tokens, rows, bias[part], h_ref, None if threshold is None else threshold[part], ends)
        for part, rows in _wide.cast_parts(weight, h.dtype)
    ]
    sums, *others = parts[0] if len(parts) == 1 else (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    count = torch.full((), len(tokens), dtype=torch.int64, device=h.device)
    return SegmentStats(sums, LatentStats(sums.sum(0), *others, count))
