"""The gradient of the narrow ops to the hidden state: (scale * coefficient) W, added to a gradient already there."""

import torch

from lockin_fast.dispatch import define

SCHEMA = "(Tensor coefficient, Tensor scale, Tensor weight, Tensor? grad) -> Tensor"
SCHEMA_IN_PLACE = "(Tensor(a!) grad, Tensor coefficient, Tensor scale, Tensor weight) -> ()"


def reference(coefficient, scale, weight, grad):
    """Plain torch, accumulated in fp32 and rounded once. A zero coefficient adds nothing, whatever the scale."""
    work = torch.promote_types(weight.dtype, torch.float32)
    scaled = (scale[:, None] * coefficient).masked_fill_(coefficient == 0, 0.0).to(work)  # [T, K]
    with torch.autocast(weight.device.type, enabled=False):
        if grad is None:
            return (scaled @ weight.to(work)).to(weight.dtype)
        return torch.addmm(grad.to(work), scaled, weight.to(work)).to(weight.dtype)


def reference_in_place(grad, coefficient, scale, weight):
    """As `reference`, written over `grad`."""
    grad.copy_(reference(coefficient, scale, weight, grad))


def _fake(coefficient, scale, weight, grad):
    return weight.new_empty((coefficient.shape[0], weight.shape[1]))


def _fake_in_place(grad, coefficient, scale, weight):
    pass


define("latent_backward", SCHEMA, reference, _fake)
define("latent_backward_", SCHEMA_IN_PLACE, reference_in_place, _fake_in_place)
_op = torch.ops.lockin_fast.latent_backward.default
_op_in_place = torch.ops.lockin_fast.latent_backward_.default


def latent_backward(coefficient, scale, weight, grad=None):
    """(grad or 0) + (scale[:, None] * coefficient) @ weight, rounded once to weight's dtype.

    coefficient [T, K] fp32: derivative of each token's value to the pre-activations. scale [T] fp32: the upstream
    gradient, one per token; any stride, so the expanded gradient of a sum costs nothing. weight [K, d]. grad [T, d]:
    a gradient that already arrived for the hidden state. Tokens with no nonzero coefficient are skipped exactly.
    Costs 2 T K d FLOPs at most, reads grad and writes the result once.
    """
    return _op(coefficient, scale.contiguous(), weight, grad)


def latent_backward_(grad, coefficient, scale, weight):
    """As `latent_backward`, written over `grad` [T, d], which has to be contiguous along d and used by nobody else."""
    _op_in_place(grad, coefficient, scale.contiguous(), weight)
    return grad
