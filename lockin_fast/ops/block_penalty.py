"""The one-sided, base-anchored penalty on K latents of latent blocking."""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from lockin_fast.dispatch import define
from lockin_fast.ops import _checks
from lockin_fast.ops.encode_latents import inactive, preactivation
from lockin_fast.ops.encode_latents import reference as encode_reference
from lockin_fast.ops.gradient_tap import TappedPenalty, tap_of
from lockin_fast.ops.latent_backward import latent_backward
from lockin_fast.ops.nf4_tensor import NF4Tensor

SCHEMA = (
    "(Tensor h, Tensor weight, Tensor bias, Tensor sign, Tensor? z_ref, Tensor? h_ref, Tensor? mask, "
    "Tensor? threshold, Tensor? margin, bool mean) -> (Tensor, Tensor, Tensor)"
)


class Penalty(NamedTuple):
    """What `block_penalty` returns; three scalars on h's device, read without a host synchronisation."""

    total: torch.Tensor  # fp32: the sum over the masked tokens, differentiable in h
    tokens: torch.Tensor  # int64: how many tokens that sum runs over
    active: torch.Tensor  # int64: how many (token, latent) pairs exceeded their margin


def reference(h, weight, bias, sign, z_ref, h_ref, mask, threshold, margin, mean):
    """Plain torch, fp32: per-token penalty [T], its derivative to the pre-activations [T, K], active pairs.

    Masked tokens are selected away, not multiplied, so that a NaN under the mask does not leak.
    """
    pre = preactivation(h, weight, bias)
    off = inactive(pre, threshold)
    if z_ref is None:
        z_ref = encode_reference(h_ref, weight, bias, threshold)
    excess = sign * (pre.masked_fill_(off, 0.0) - z_ref)  # [T, K]
    excess = (excess if margin is None else excess - margin).relu_()
    share = 1.0 / max(weight.shape[0], 1) if mean else 1.0
    per_token = excess.square().sum(1) * share
    coefficient = (excess * sign).masked_fill_(off, 0.0).mul_(2.0 * share)
    positive = excess > 0
    if mask is not None:
        per_token = torch.where(mask, per_token, 0.0)
        coefficient = coefficient.masked_fill_(~mask[:, None], 0.0)
        positive &= mask[:, None]
    return per_token, coefficient, positive.sum()


def _fake(h, weight, bias, sign, z_ref, h_ref, mask, threshold, margin, mean):
    work = torch.promote_types(h.dtype, torch.float32)
    tokens, count = h.shape[0], weight.shape[0]
    coefficient = h.new_empty((tokens, count), dtype=work)
    return h.new_empty((tokens,), dtype=work), coefficient, h.new_empty((), dtype=torch.int64)


define("block_penalty", SCHEMA, reference, _fake)
op = torch.ops.lockin_fast.block_penalty.default


def run(*args):
    """The op on the arguments that `op_arguments` made: 10 of them, or more for a reference in NF4."""
    return op(*args) if len(args) == 10 else torch.ops.lockin_fast.block_penalty_nf4.default(*args)


class PerTokenPenalty(torch.autograd.Function):
    """(per_token [T], active): the op with its gradient to h, right for any upstream gradient of per_token."""

    @staticmethod
    def forward(ctx, *args):
        per_token, coefficient, active = run(*args)
        ctx.save_for_backward(coefficient, args[1])
        ctx.mark_non_differentiable(active)
        return per_token, active

    @staticmethod
    @once_differentiable
    def backward(ctx, scale, _):
        others = [None] * (len(ctx.needs_input_grad) - 1)
        return latent_backward(ctx.saved_tensors[0], scale, ctx.saved_tensors[1]), *others


def op_arguments(h, weight, bias, sign, z_ref, h_ref, mask, threshold, margin, latent_reduction):
    """Check the arguments of `block_penalty` and bring them into the form of the op: flat tokens, one dtype."""
    count = _checks.rows(weight, bias)
    _checks.frozen(weight, bias)
    tokens = _checks.hidden("h", h, weight.shape[1])
    _checks.per_latent("sign", sign, count)
    _checks.per_latent("threshold", threshold, count, optional=True)
    _checks.per_latent("margin", margin, count, optional=True)
    if (z_ref is None) == (h_ref is None):
        given = "neither" if z_ref is None else "both"
        raise ValueError(f"z_ref, h_ref: got {given}, expected exactly one, the reference's latents or hidden state")
    if latent_reduction not in ("sum", "mean"):
        raise ValueError(f"latent_reduction: got {latent_reduction!r}, expected 'sum' or 'mean'")
    leading = h.shape[:-1]
    if z_ref is not None:
        _checks.tensor("z_ref", z_ref, f"[..., {count}], one value per token and latent")
        if z_ref.shape != (*leading, count):
            raise ValueError(
                f"z_ref: got shape {tuple(z_ref.shape)}, expected {(*leading, count)}, one value per token and latent"
            )
        z_ref = _checks.fp32(z_ref).view(tokens.shape[0], count)
    elif isinstance(h_ref, NF4Tensor):
        _checks.reference_shape(h_ref, h)
    else:
        h_ref = _checks.reference(h_ref, h)
    mask = _checks.token_mask(mask, leading)
    _checks.same_device(
        h, weight=weight, bias=bias, sign=sign, z_ref=z_ref, h_ref=h_ref, mask=mask, threshold=threshold, margin=margin
    )
    fp32, mean = _checks.fp32, latent_reduction == "mean"
    operands = tokens, _checks.rows_like(weight, h), fp32(bias), fp32(sign)
    options = mask, fp32(threshold), fp32(margin), mean
    if isinstance(h_ref, NF4Tensor):
        *packed, blocksize = h_ref.operands(h.dtype)
        return *operands, *packed, *options, blocksize
    return *operands, z_ref, h_ref, *options


def count_tokens(tokens, mask):
    """How many tokens the penalty runs over, as an int64 scalar on the device."""
    return mask.sum() if mask is not None else tokens.new_full((), tokens.shape[0], dtype=torch.int64)


def block_penalty(
    h, weight, bias, sign, *, z_ref=None, h_ref=None, mask=None, threshold=None, margin=None, latent_reduction="sum"
):
    """One-sided penalty on K latents against a frozen reference: the latent-blocking loss, before lambda.

        z       = relu(h W^T + b) * (h W^T + b > threshold)
        excess  = relu(sign * (z - z_ref) - margin)
        total   = sum over masked tokens of the sum (or mean) over latents of excess^2

    Arguments
        h: hidden states [..., d], float32, float16 or bfloat16, e.g. the output of one decoder layer.
        weight, bias: encoder rows [K, d] and [K] in normal form; cast to h's dtype and float32. Frozen.
        sign: [K], +1 to keep a latent from rising above the reference, -1 from falling below it.
        z_ref: the reference's latents [..., K]; or
        h_ref: the reference's hidden state, shape and dtype of h, encoded in the same pass with the same arithmetic, so
            that h_ref equal to h gives exactly 0.0; or the same as an NF4Tensor, which is decoded to h's dtype a few
            tokens at a time. Exactly one of the two; both are constants to the gradient.
        mask: bool [...], True for tokens that count (the supervised ones). None counts all.
        threshold: JumpReLU thresholds [K]; None is a plain ReLU.
        margin: [K], how far a latent may move for free, e.g. the noise floor of a cached reference.
        latent_reduction: "sum" or "mean" over the K latents; they differ by a factor K in what lambda means.

    Returns `Penalty(total, tokens, active)`: float32 and two int64 scalars on h's device. Divide `total` by the
    trainer's own normaliser; `tokens` is the count under the mask. Differentiable in `h` alone, once.

    Numerics: operands in h's dtype, products accumulated in float32, everything after in float32. NaN and Inf in a
    counted token reach `total`; in a masked token they do not.

    Raises TypeError or ValueError, before any work, for a wrong dtype, shape, device or reference, and when `weight` or
    `bias` requires grad.

    Costs 2 T d K FLOPs (twice that with h_ref) and one read of h; never [T, F]. Keeps [T, K] float32 for the backward,
    which skips tokens where nothing is active, and makes a gradient [..., d] unless h comes from `gradient_tap`.

    Definition: BLOCK-EM, arXiv 2602.00767.
    """
    args = op_arguments(h, weight, bias, sign, z_ref, h_ref, mask, threshold, margin, latent_reduction)
    if h.requires_grad and torch.is_grad_enabled():
        tap = tap_of(h)
        if tap is None:
            per_token, active = PerTokenPenalty.apply(*args)
        else:
            per_token, coefficient, active = run(args[0].detach(), *args[1:])
            per_token, active = TappedPenalty.apply(h, tap, per_token, coefficient, active, args[1])
    else:
        per_token, _, active = run(*args)
    return Penalty(per_token.sum(), count_tokens(args[0], mask), active)
