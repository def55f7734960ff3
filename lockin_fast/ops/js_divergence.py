"""How much next-token distributions differ: the generalised Jensen-Shannon divergence, from logits."""

import math

import torch

from lockin_fast.dispatch import define
from lockin_fast.ops import _checks

SCHEMA = "(Tensor logits, Tensor? weights) -> Tensor"


def reference(logits, weights):
    """Plain torch, position by position in fp64: [S] bits of `logits` [n, S, V]. A prompt of weight 0 is left out."""
    count, positions = logits.shape[:2]
    share = logits.new_full((count,), 1 / count, dtype=torch.float64) if weights is None else weights.double()
    counts = (share != 0)[:, None]
    bits = logits.new_empty((positions,), dtype=torch.promote_types(logits.dtype, torch.float32))
    for s in range(positions):
        p = torch.where(counts, logits[:, s].double().softmax(1), 0.0)  # [n, V]
        mean = share @ p
        # p log(p / mean) needs no difference of entropies, and a token that is banned everywhere weighs nothing.
        terms = torch.xlogy(p, p / mean.masked_fill(mean == 0, 1.0))
        bits[s] = (share @ terms).sum() / math.log(2)
    return bits.clamp_(0.0, math.log2(count))


def _fake(logits, weights):
    return logits.new_empty((logits.shape[1],), dtype=torch.promote_types(logits.dtype, torch.float32))


define("js_divergence", SCHEMA, reference, _fake)
_op = torch.ops.lockin_fast.js_divergence.default


@torch.no_grad()
def js_divergence(logits, *, weights=None):
    """Generalised Jensen-Shannon divergence, in bits, of n next-token distributions at every position.

        p_i     = softmax(logits[i])
        m       = sum over i of w_i p_i
        JSD     = H(m) - sum over i of w_i H(p_i)  =  sum over i of w_i sum over tokens of p_i log2(p_i / m)

    Arguments
        logits: [n, ..., V], float32, float16 or bfloat16: n prompts of a cluster (paraphrases of one question) over
            the same positions. [n, V] gives a scalar.
        weights: [n], at least 0 and not all 0, which is checked on the CPU alone; scaled here to sum to 1. None weighs
            the prompts alike. A prompt of weight 0 is left out, whatever it holds.

    Returns bits [...] in float32, between 0 (the same distribution everywhere) and log2(n) (no token in common); its
    square root is a metric. Prompt invariance is the mean over clusters.

    A logit of -inf is a probability of exactly 0, and a token that no prompt allows counts for nothing. NaN in a
    position makes its result NaN, and so do, as in torch's softmax, +inf and a row of nothing but -inf. No gradient.

    Numerics: float32 with sums over the vocabulary in float64. The terms summed are w_i m (r ln r - r + 1) with
    r = p_i / m, none of them negative, so that nearly equal distributions keep their small divergence: results down to
    about 1e-12 bits carry information, where a difference of entropies in float32 ends at 1e-6.

    Raises TypeError or ValueError, before any work, for a wrong dtype, shape or device.

    Costs two reads of the logits and two exponentials and a logarithm per logit; the scratch memory is that of one row.

    Lin, "Divergence measures based on the Shannon entropy", IEEE Trans. Inf. Theory 37 (1991); prompt invariance as in
    arXiv 2510.20190.
    """
    _checks.tensor("logits", logits, "[n, ..., V]")
    _checks.floating("logits", logits)
    if logits.dim() < 2 or logits.shape[0] == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits: got shape {tuple(logits.shape)}, expected [n, ..., V] with at least one prompt and one token; "
            "stack the prompts of a cluster along the first dimension"
        )
    count, *leading, vocabulary = logits.shape
    if weights is not None:
        _checks.tensor("weights", weights, f"[{count}], one weight per prompt, or None")
        if weights.shape != (count,) or not weights.is_floating_point():
            raise ValueError(
                f"weights: got {weights.dtype} {tuple(weights.shape)}, expected floating point [{count}], "
                "one weight per prompt"
            )
        _checks.same_device(logits, of="logits", weights=weights)
        if _checks.known(weights) and ((weights < 0).any() or not weights.any()):
            raise ValueError(f"weights: got {weights.tolist()}, expected none below 0 and not all of them 0")
        weights = weights.double()
        weights = (weights / weights.sum()).float()
    rows = logits.reshape(count, -1, vocabulary)
    return _op(rows if rows.stride(-1) == 1 or vocabulary == 1 else rows.contiguous(), weights).view(leading)
