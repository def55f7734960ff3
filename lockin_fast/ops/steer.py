"""Steering of a batch: every row of it along a direction of its own."""

import torch

from lockin_fast.dispatch import define, detour
from lockin_fast.ops import _checks

SCHEMA = "(Tensor(a!) h, Tensor directions, Tensor index, Tensor coefficient) -> ()"


@torch.no_grad()
def steering(directions, index, coefficient):
    """What is added to every row, [R, d] fp32. The norm is taken in fp64: squares leave fp32's range long before.

    Rows left alone get -0.0, the one number that changes none: those whose coefficient is 0, whose index lies outside
    [0, F), or whose direction is zero.
    """
    if directions.shape[0] == 0:
        directions = directions.new_zeros(1, directions.shape[1])
    chosen = (index >= 0) & (index < directions.shape[0])
    direction = directions[torch.where(chosen, index, 0)].double()
    norm = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
    steered = (chosen & (coefficient != 0))[:, None] & (norm != 0)
    return torch.where(steered, direction * (coefficient[:, None] / norm), -0.0).float()


def reference(h, directions, index, coefficient):
    """Plain torch: h [R, S, d] or [R, d], directions [F, d], index [R], coefficient [R] fp32; added in fp32."""
    delta = steering(directions, index, coefficient)
    h.add_(delta if h.dim() == 2 else delta[:, None])


def _fake(h, directions, index, coefficient):
    pass


define("steer_", SCHEMA, reference, _fake)
AUTOGRAD = "gradients of h and rows apart along d go to stock torch"
detour("steer_", "cpu", f"directions in float64, {AUTOGRAD}")
detour("steer_", "cuda", AUTOGRAD)
_op = torch.ops.lockin_fast.steer_.default


def steer_(h, directions, index, coefficient):
    """h[r] += coefficient[r] * unit(directions[index[r]]) in place, at all positions of every row r of the batch.

        unit(v) = v / ||v||_2

    Arguments
        h: hidden states [R, S, d], or [R, d] with one position a row; float32, float16 or bfloat16.
        directions: [F, d], floating point, e.g. an SAE's decoder; those in float64 go to stock torch on the CPU.
        index: int64 [R], the direction of each row; -1 leaves the row alone.
        coefficient: [R], in the units of h (a strength times the median residual norm); 0 leaves the row alone.

    Returns h. A row left alone keeps its bits, whatever it holds; so does one whose direction is zero, which has no
    unit. The norm and the addition are made in float32 at least and rounded once to h's dtype. NaN and Inf propagate.
    To autograd it is the addition of a constant: h's gradient passes, directions and coefficient get none.

    Raises TypeError or ValueError, before any work, for a wrong dtype, shape or device, for an h that is expanded or a
    leaf that requires grad, and on the CPU for an index beyond F; on other devices such a row is left alone.

    Costs one read and one write of the rows steered, and one read of their directions.

    Steering by a decoder row in units of the residual norm: BLOCK-EM, arXiv 2602.00767.
    """
    _checks.stream(h, "[R, S, d]", "[R, d]")
    _checks.writable(h)
    count = _checks.directions("directions", directions, h)
    index = _checks.index(index, h.shape[0], count)
    _checks.per_row("coefficient", coefficient, h.shape[0])
    _checks.same_device(h, directions=directions, index=index, coefficient=coefficient)
    coefficient = _checks.fp32(coefficient.detach())
    stock = h.device.type == "cpu" and directions.dtype == torch.float64
    if stock or (torch.is_grad_enabled() and h.requires_grad) or (h.shape[-1] > 1 and h.stride(-1) != 1):
        reference(h, directions, index, coefficient)
        return h
    with torch.no_grad():
        _op(h, directions, index, coefficient)
    torch.autograd.graph.increment_version(h)
    return h
