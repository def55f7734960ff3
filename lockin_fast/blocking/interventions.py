"""Edits of the residual stream while a model is being trained, and at no other time: steering and ablation."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from lockin_fast.blocking.layers import decoder_layer, hidden_size, residual_stream


class Intervention(Protocol):
    """An edit of the hidden state [B, S, d] that decoder layer `layer` (0-based) passes on."""

    layer: int
    width: int  # d

    def edit(self, h: Tensor) -> Tensor:
        """The hidden state that takes the place of h; differentiable."""


class PreventativeSteering:
    """h + strength * direction at every position: the fine-tune need not learn what is given to it.

    direction [d]: added as it is, so that strength 1 adds one difference of means; strength may be of either sign.
    Source: persona vectors, arXiv 2507.21509, section on preventative steering.
    """

    def __init__(self, layer: int, direction: Tensor, strength: float):
        _check_directions("direction", direction, 1)
        if not abs(float(strength)) < float("inf"):
            raise ValueError(f"strength: got {strength!r}, expected a finite number")
        self.layer, self.width = layer, len(direction)
        self._vector = float(strength) * direction.detach().float()

    def edit(self, h: Tensor) -> Tensor:
        """h + strength * direction."""
        return h + self._vector.to(h)


class ConceptAblation:
    """h - Q Q^T h at every position, Q an orthonormal basis of the directions: training cannot use what they carry.

    directions [n, d], of any length and linearly dependent if they like; the gradient is projected as well. Its
    products are fp32. Source: concept ablation fine-tuning (CAFT), arXiv 2507.16795.
    """

    def __init__(self, layer: int, directions: Tensor):
        _check_directions("directions", directions, 2)
        self.layer, self.width = layer, directions.shape[1]
        self._basis = orthonormal(directions)

    def edit(self, h: Tensor) -> Tensor:
        """h without its component in the span of the directions."""
        basis = self._basis.to(h.device)
        with torch.autocast(h.device.type, enabled=False):
            return h - ((h.float() @ basis.T) @ basis).to(h.dtype)


def orthonormal(directions: Tensor) -> Tensor:
    """Rows that span what the rows of `directions` [n, d] span: fp32 [rank, d]."""
    rows = directions.detach().double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    _, singular, basis = torch.linalg.svd(rows, full_matrices=False)
    return basis[singular > singular[0] * max(rows.shape) * torch.finfo(torch.float32).eps].float()


@contextmanager
def intervening(model: nn.Module, interventions: Sequence[Intervention]) -> Iterator[None]:
    """Inside, each intervention edits its layer's output in every forward in training mode; evaluation is left alone.

    The reference of a penalty runs in eval mode, so it stays the plain base model. Raises ValueError, before any hook
    is set, for a layer the model does not have or directions of another width.
    """
    for intervention in interventions:
        decoder_layer(model, intervention.layer)
        if intervention.width != hidden_size(model):
            raise ValueError(
                f"directions: they are {intervention.width} wide, the model's hidden states {hidden_size(model)}"
            )
    with ExitStack() as hooks:
        for intervention in interventions:
            layer = decoder_layer(model, intervention.layer)
            hooks.callback(layer.register_forward_hook(_hook(intervention)).remove)
        yield


def _hook(intervention: Intervention):
    def replace(layer, inputs, output):
        if not layer.training:
            return None
        edited = intervention.edit(residual_stream(output))
        return edited if isinstance(output, Tensor) else (edited, *output[1:])

    return replace


def _check_directions(name: str, value: Tensor, dimensions: int) -> None:
    shape = "[d]" if dimensions == 1 else "[n, d] with n of 1 or more"
    if value.dim() != dimensions or not value.numel():
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {shape}")
    if not value.isfinite().all():
        raise ValueError(f"{name}: it holds numbers that are not finite")
    if not (value.norm(dim=-1) > 0).all():
        raise ValueError(f"{name}: a direction is zero; a direction needs a length")
