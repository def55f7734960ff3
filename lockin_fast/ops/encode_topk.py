"""The k largest latents of every token out of a whole SAE, without ever holding [T, F].

As with `latent_stats` the matrix product is nearly all of the time: on a CPU below AVX-512 the reference here, torch's
own product over tiles, is the kernel too; from AVX-512 on the compiled part serves.
"""

from typing import NamedTuple

import torch

from lockin_fast.dispatch import define, stock
from lockin_fast.ops import _checks, _wide

SCHEMA = "(Tensor h, Tensor weight, Tensor bias, Tensor? threshold, int k) -> (Tensor, Tensor)"
_LOW = 2**32 - 1


class EncodedTopK(NamedTuple):
    """The largest latents of each token, in descending order."""

    values: torch.Tensor  # [..., k] fp32
    indices: torch.Tensor  # [..., k] int64


def keys(values, indices):
    """One integer for a latent's value (>= 0 or NaN) and its index, greater for what comes first in the result.

    The bits of floats that are not negative are in the floats' own order, and NaN's, made the same for all, lie above.
    Among equal values the lower index comes first.
    """
    bits = values.masked_fill(values.isnan(), torch.nan).view(torch.int32)
    return (bits.clamp_min(0).long() << 32) | (_LOW - indices)  # -0.0 is 0


def from_keys(merged):
    """Values and indices of `keys`."""
    return (merged >> 32).int().view(torch.float32), _LOW - (merged & _LOW)


def reference(h, weight, bias, threshold, k):
    """Plain torch over tiles of tokens and latents, every large buffer allocated once; keeps the k largest so far."""
    (tokens, width), latents = h.shape, weight.shape[0]
    rows, columns = _wide.tile_shape(tokens, width, latents)
    rows = max(min(rows, _wide.PRODUCT_ELEMENTS // max(k, 1)), 1)
    operand = _wide.Buffer((rows, width), torch.float32, h.device)
    weights = _wide.Buffer((columns, width), torch.float32, h.device)
    product = _wide.Buffer((rows, columns), torch.float32, h.device)
    places = torch.arange(latents, device=h.device)
    values = h.new_empty((tokens, k), dtype=torch.float32)
    indices = h.new_empty((tokens, k), dtype=torch.int64)

    for t0 in range(0, tokens, rows):
        block = slice(t0, min(t0 + rows, tokens))
        x = operand.holding(h[block])
        best = places.new_empty((x.shape[0], 0))
        for k0 in range(0, latents, columns):
            part = slice(k0, min(k0 + columns, latents))
            w, floor = weights.holding(weight[part]).t(), None if threshold is None else threshold[part]
            out = product.shaped(x.shape[0], part.stop - k0)
            z = keys(_wide.encode_tile(x, w, bias[part].float(), floor, out), places[part])
            best = largest(torch.cat([best, largest(z, k)], 1), k)
        values[block], indices[block] = from_keys(best)
    return values, indices


def largest(merged, k):
    """The k largest of each row, or all of a shorter row, in descending order."""
    return merged.topk(min(k, merged.shape[1]), dim=1).values


def _fake(h, weight, bias, threshold, k):
    shape = (h.shape[0], k)
    return h.new_empty(shape, dtype=torch.float32), h.new_empty(shape, dtype=torch.int64)


define("encode_topk", SCHEMA, reference, _fake)
stock("encode_topk", "stock torch matrix products over tiles are as fast below AVX-512")
_op = torch.ops.lockin_fast.encode_topk.default


@torch.no_grad()
def encode_topk(h, weight, bias, k, *, threshold=None):
    """The k largest latents of every token over the full width, and which they are; never [T, F].

        z               = relu(h W^T + b) * (h W^T + b > threshold)
        values, indices = the k largest of z in descending order

    Arguments
        h: hidden states [..., d], float32, float16 or bfloat16.
        weight, bias: encoder rows [F, d] and [F] in normal form; cast to h's dtype, 16 MB at a time, and float32.
        k: how many, from 0 to F.
        threshold: JumpReLU thresholds [F]; None is a plain ReLU.

    Returns `EncodedTopK(values, indices)`, [..., k] in float32 and int64. Every call gives the same: equal values are
    in the order of their indices. A token with fewer than k latents on is filled up with latents that are off, value 0
    and the lowest indices, so that indices always name k different latents. NaN counts as largest, as in torch.topk.

    No gradient; `encode_latents` of chosen rows has one.

    Raises TypeError or ValueError, before any work, for a wrong dtype, shape, device or k.

    Costs 2 T d F FLOPs and one read of the weight; the scratch memory is below 64 MB whatever T, F and the dtypes, when
    the result itself is, and 3 MB for each thread after the first.

    The encode of TopK SAEs, Gao et al., arXiv 2406.04093.
    """
    latents = _checks.rows(weight, bias)
    tokens = _checks.hidden("h", h, weight.shape[1])
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k: got {type(k).__name__}, expected an int")
    if not 0 <= k <= latents:
        raise ValueError(f"k: got {k}, expected 0 to {latents}, the number of latents (rows of weight)")
    _checks.per_latent("threshold", threshold, latents, optional=True)
    _checks.same_device(h, weight=weight, bias=bias, threshold=threshold)
    bias, threshold = _checks.fp32(bias), _checks.fp32(threshold)
    values, indices = _encode_in_parts(tokens, weight, bias, threshold, k)
    return EncodedTopK(values.view(*h.shape[:-1], k), indices.view(*h.shape[:-1], k))


def _encode_in_parts(h, weight, bias, threshold, k):
    """The op on some latents after others where the weight has to be cast, and the largest of all."""
    best = None
    for part, rows in _wide.cast_parts(weight, h.dtype):
        floor = None if threshold is None else threshold[part]
        values, indices = _op(h, rows, bias[part], floor, min(k, rows.shape[0]))
        if rows is weight:
            return values, indices
        found = keys(values, indices + part.start)
        best = found if best is None else largest(torch.cat([best, found], 1), k)
    return from_keys(best)
