"""Checks of a choice of latents: indices into an SAE of known width."""

from collections.abc import Sequence

import torch
from torch import Tensor


def as_latents(latents: Tensor | Sequence[int], width: int) -> Tensor:
    """Latent indices as int64 ``[K]``, in the order given.

    Raises ValueError when an index is not an integer, lies outside ``[0, width)``, or occurs twice.
    """
    index = torch.as_tensor(latents)
    if index.numel() == 0:
        return torch.empty(0, dtype=torch.int64)
    if index.dim() != 1:
        raise ValueError(f"latents must be one-dimensional, got shape {tuple(index.shape)}")
    if index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
        raise ValueError(f"latents must be integer indices, got {index.dtype}")
    index = index.to(device="cpu", dtype=torch.int64)
    outside = index[(index < 0) | (index >= width)]
    if outside.numel():
        raise ValueError(f"latents: index {int(outside[0])} is out of range for an SAE of {width} latents")
    ordered = index.sort().values
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if repeated.numel():
        raise ValueError(f"latents: index {int(repeated[0])} occurs more than once; list every latent once")
    return index
