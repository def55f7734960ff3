"""An identity node on the hidden state, into whose gradient a penalty that is computed later adds its own."""

import torch
from torch.autograd.function import once_differentiable

from lockin_fast.ops._unshared import holders_are_seen, unshared
from lockin_fast.ops.latent_backward import latent_backward, latent_backward_


class GradientTap(torch.autograd.Function):
    """h -> (h, control). The backward adds what has been left in `due` during the same backward call.

    It saves no tensor, so that activation checkpointing sees no difference, and it does not depend on when it is made:
    whatever penalises its output runs after it in the forward, hence before it in the backward.
    """

    @staticmethod
    def forward(ctx, h):
        ctx.due = []  # (backward call, coefficient [T, K], scale [T], weight [K, d])
        control = torch.zeros((), dtype=torch.int64, device=h.device)
        ctx.mark_non_differentiable(control)
        return h.view_as(h), control

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, control):
        call, due, ctx.due = torch._C._current_graph_task_id(), ctx.due, []
        may_write = holders_are_seen() and unshared(grad, control)
        for left_by, coefficient, scale, weight in due:
            if left_by != call:  # of a backward call that asked for no gradient below the tap
                continue
            if may_write:
                latent_backward_(grad.view(-1, weight.shape[1]), coefficient, scale, weight)
            else:
                flat = grad.reshape(-1, weight.shape[1])
                grad, may_write = latent_backward(coefficient, scale, weight, flat).view(grad.shape), True
        return grad


class TappedPenalty(torch.autograd.Function):
    """(per_token [T], active) as given; its backward leaves the gradient to h with the tap instead of making it."""

    @staticmethod
    def forward(ctx, h, tap, per_token, coefficient, active, weight):
        ctx.tap = tap
        ctx.save_for_backward(coefficient, weight)
        ctx.mark_non_differentiable(active)
        return per_token.view_as(per_token), active.view_as(active)

    @staticmethod
    @once_differentiable
    def backward(ctx, scale, _):
        coefficient, weight = ctx.saved_tensors
        ctx.tap.due.append((torch._C._current_graph_task_id(), coefficient, scale, weight))
        return (None,) * len(ctx.needs_input_grad)


def tap_of(h):
    """The tap of which h is the output, or None. A compiled graph has none: what it traces cannot leave notes."""
    if torch.compiler.is_compiling() or not isinstance(h.grad_fn, GradientTap._backward_cls):
        return None
    return h.grad_fn


def is_tapped(h):
    """Whether a penalty of h, as it is, leaves its gradient with a tap."""
    return tap_of(h) is not None


def gradient_tap(h):
    """h itself, to be used in its place from here on: `block_penalty` of it then costs no gradient tensor of its own.

    It is `block_penalty_tap` in two halves, for a penalty that can be computed only after the forward pass. Values are
    the same as without it, for any scaling, accumulation, order or repetition of backward calls. In the backward the
    penalty runs first, and leaves its upstream gradient and coefficients with the tap; the tap adds scale * c W to the
    gradient that arrives from the layers above, in place where that is provably nobody else's. A hook on the returned
    tensor sees the gradient before that; one on what went in sees it whole, and so does every parameter below.

    Where no gradient is asked for, and while torch.compile traces, h comes back as it is and nothing is saved. Costs
    nothing forward; backward 2 T K d FLOP on active tokens and no memory.
    """
    if torch.compiler.is_compiling() or not (h.requires_grad and torch.is_grad_enabled()):
        return h
    return GradientTap.apply(h)[0]
