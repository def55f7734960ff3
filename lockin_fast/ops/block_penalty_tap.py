"""The penalty as an identity node on the hidden state, which adds its gradient to the one on the way back."""

import torch
from torch.autograd.function import once_differentiable

from lockin_fast.ops._unshared import holders_are_seen, unshared
from lockin_fast.ops.block_penalty import Penalty, count_tokens, op_arguments, run
from lockin_fast.ops.latent_backward import latent_backward, latent_backward_


class _Tap(torch.autograd.Function):
    """h -> (h, total, active); an in-place backward where the gradient that arrives is provably nobody else's."""

    @staticmethod
    def forward(ctx, h, *args):
        per_token, coefficient, active = run(*args)
        ctx.save_for_backward(coefficient, args[1])
        ctx.mark_non_differentiable(active)
        ctx.may_write = not torch.compiler.is_compiling() and holders_are_seen()
        return h.view_as(h), per_token.sum(), active

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, scale, control):
        coefficient, weight = ctx.saved_tensors
        others = [None] * (len(ctx.needs_input_grad) - 1)
        scale = scale.expand(coefficient.shape[0])
        if ctx.may_write and unshared(grad, control):
            latent_backward_(grad.view(-1, weight.shape[1]), coefficient, scale, weight)
            return grad, *others
        flat = grad.reshape(-1, weight.shape[1])
        return latent_backward(coefficient, scale, weight, flat).view(grad.shape), *others


def block_penalty_tap(
    h, weight, bias, sign, *, z_ref=None, h_ref=None, mask=None, threshold=None, margin=None, latent_reduction="sum"
):
    """`block_penalty` as a tap: returns (h, Penalty), h unchanged, to be used in place of h from here on.

    Formula, arguments and errors are those of `block_penalty`. The difference is in the backward: the penalty's
    gradient is added, in float32 and rounded once, to the gradient that arrives for the returned h, instead of being
    built as a second [..., d] tensor that autograd then adds: in place where that gradient is provably nobody else's
    (in eager mode it nearly always is), into a fresh tensor otherwise. Use it where the penalty can be computed inside
    the forward pass; the returned h must be the one that the later layers read.
    """
    args = op_arguments(h, weight, bias, sign, z_ref, h_ref, mask, threshold, margin, latent_reduction)
    if h.requires_grad and torch.is_grad_enabled():
        out, total, active = _Tap.apply(h, args[0].detach(), *args[1:])
    else:
        per_token, _, active = run(*args)
        out, total = h, per_token.sum()
    return out, Penalty(total, count_tokens(args[0], mask), active)
