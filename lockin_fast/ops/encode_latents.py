"""Latent activations of chosen SAE rows: z = act(h W^T + b)."""

import torch
from torch.autograd.function import once_differentiable

from lockin_fast.dispatch import FORCED, define, detour
from lockin_fast.ops import _checks
from lockin_fast.ops.latent_backward import latent_backward

# On the CPU a wider weight than this is a matrix product that stock torch does as fast or faster (measured: equal up to
# 2M entries, 1.3 to 3 times as fast at 8M). A forced backend gets every call.
WIDE_BYTES = 16 * 2**20
TILE_ELEMENTS = 2**21

SCHEMA = "(Tensor h, Tensor weight, Tensor bias, Tensor? threshold) -> Tensor"


def preactivation(h, weight, bias):
    """h W^T + b, products accumulated in fp32 whatever the operands' dtype (fp64 stays fp64)."""
    work = torch.promote_types(h.dtype, torch.float32)
    with torch.autocast(h.device.type, enabled=False):
        return torch.addmm(bias.to(work), h.to(work), weight.to(work).t())  # [T, K]


def inactive(pre, threshold):
    """Where a latent is switched off: pre <= max(threshold, 0). Written so that NaN counts as on and propagates."""
    return pre <= (0.0 if threshold is None else threshold.clamp_min(0.0).to(pre.dtype))


def reference(h, weight, bias, threshold):
    """Plain torch: relu(pre) * (pre > threshold), in fp32."""
    pre = preactivation(h, weight, bias)
    return pre.masked_fill_(inactive(pre, threshold), 0.0)


def wide(h, weight, bias, threshold):
    """Plain torch for a weight that no cache holds: a tile of it in fp32 at a time."""
    z = torch.empty((h.shape[0], weight.shape[0]), dtype=torch.float32, device=h.device)
    h = h.to(torch.float32)
    rows = max(TILE_ELEMENTS // weight.shape[1], 1)
    with torch.autocast(h.device.type, enabled=False):
        for part, w, b in zip(z.split(rows, 1), weight.split(rows), bias.split(rows), strict=True):
            torch.addmm(b, h, w.to(torch.float32).t(), out=part)
    return z.relu_() if threshold is None else z.masked_fill_(inactive(z, threshold), 0.0)


def _fake(h, weight, bias, threshold):
    return h.new_empty((h.shape[0], weight.shape[0]), dtype=torch.promote_types(h.dtype, torch.float32))


define("encode_latents", SCHEMA, reference, _fake)
_op = torch.ops.lockin_fast.encode_latents.default
if not FORCED:
    detour("encode_latents", "cpu", f"weights over {WIDE_BYTES >> 20} MB go to stock torch, as fast there")


def _forward(h, weight, bias, threshold):
    stock = not FORCED and h.device.type == "cpu" and weight.numel() * weight.element_size() > WIDE_BYTES
    return (wide if stock else _op)(h, weight, bias, threshold)


class _EncodeLatents(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, bias, threshold):
        z = _forward(h, weight, bias, threshold)
        ctx.save_for_backward(z, weight)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        z, weight = ctx.saved_tensors
        # z > 0 exactly where the latent is on, so the output is all that has to be kept; NaN passes as in torch's relu.
        coefficient = grad.masked_fill(z <= 0, 0.0)
        return latent_backward(coefficient, grad.new_ones(grad.shape[0]), weight), None, None, None


def encode_latents(h, weight, bias, *, threshold=None):
    """Activations of K chosen latents: z = relu(h W^T + b) * (h W^T + b > threshold).

    Arguments
        h: hidden states [..., d], float32, float16 or bfloat16.
        weight: encoder rows [K, d] in normal form (decoder bias and input scale folded into `bias`); cast to h's dtype.
        bias: [K].
        threshold: JumpReLU thresholds [K]; None (or -inf) is a plain ReLU. The comparison is strict.

    Returns z [..., K] in float32, products accumulated in float32; differentiable in `h` once, by the ReLU's own
    derivative (no gradient through the threshold). NaN and Inf in h propagate.

    Raises TypeError or ValueError for a wrong dtype, shape or device, and when `weight` or `bias` requires grad: SAE
    weights are frozen.

    Costs 2 T d K FLOPs and one read of h; the backward the same, less the tokens without an active latent. A full-width
    encode (K = F) writes [T, F]; `latent_stats` is there for when only sums are wanted.

    JumpReLU as in Rajamanoharan et al., arXiv 2407.14435.
    """
    count = _checks.rows(weight, bias)
    _checks.frozen(weight, bias)
    tokens = _checks.hidden("h", h, weight.shape[1])
    _checks.per_latent("threshold", threshold, count, optional=True)
    _checks.same_device(h, weight=weight, bias=bias, threshold=threshold)
    args = tokens, _checks.rows_like(weight, h), _checks.fp32(bias), _checks.fp32(threshold)
    z = _EncodeLatents.apply(*args) if h.requires_grad and torch.is_grad_enabled() else _forward(*args)
    return z if h.dim() == 2 else z.view(*h.shape[:-1], count)
