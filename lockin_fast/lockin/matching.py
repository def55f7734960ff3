"""Which latents of two SAEs are the same: by the directions that they write."""

from typing import NamedTuple

import torch
from torch import Tensor

TILE_ELEMENTS = 2**22  # of the cosines held at a time: 16 MB
LARGEST = 4096
"""Latents up to which an optimal assignment is made: it takes time as their cube, and 8 bytes for each pair."""


class Matches(NamedTuple):
    """Pairs of latents, [M] each, in the order of `first`."""

    first: Tensor  # int64, rows of the first decoder
    second: Tensor  # int64, rows of the second
    cosine: Tensor  # fp32, in [-1, 1]


@torch.no_grad()
def mutual_nearest(first: Tensor, second: Tensor) -> Matches:
    """The latents of two SAEs that are each other's nearest by decoder cosine; never [F, G].

    Two trainings of an SAE order their latents as they like; a latent that has no counterpart stays without.

    Arguments: decoder rows [F, d] and [G, d], floating point. Rows of zeros have no direction and no match; of equal
    cosines the lower index wins. Raises ValueError for other shapes and NaN or Inf. Costs 2 F G d FLOPs in fp32, and
    a tile of 16 MB beside both decoders in fp32. Source: ours, as in comparisons of dictionaries since Bricken et al.
    (2023).
    """
    (rows, a), (columns, b) = _directions(first, second)
    if not len(a) or not len(b):
        return Matches(rows[:0], columns[:0], a.new_zeros(0))
    nearest, cosine = rows.new_zeros(len(a)), a.new_zeros(len(a))
    best, origin = b.new_full((len(b),), -torch.inf), columns.new_zeros(len(b))
    size = max(TILE_ELEMENTS // len(b), 1)
    for start in range(0, len(a), size):
        part = slice(start, start + size)
        tile = a[part] @ b.T
        cosine[part], nearest[part] = tile.max(1)
        value, row = tile.max(0)
        origin = torch.where(value > best, row + start, origin)
        best = torch.maximum(value, best)
    mutual = origin[nearest] == torch.arange(len(a), device=a.device)
    return Matches(rows[mutual], columns[nearest[mutual]], cosine[mutual].clamp(-1, 1))


@torch.no_grad()
def assigned(first: Tensor, second: Tensor) -> Matches:
    """The one-to-one pairing of two SAEs' latents with the largest sum of decoder cosines (Hungarian).

    Every latent of the smaller SAE gets one, however poor its cosine. Arguments and errors as `mutual_nearest`, and
    ValueError for more than `LARGEST` latents. Needs scipy. Costs 8 F G bytes and time as the cube of the smaller.
    """
    from scipy.optimize import linear_sum_assignment

    most = max(first.shape[0], second.shape[0])
    if most > LARGEST:
        raise ValueError(f"first, second: got {most} latents, expected at most {LARGEST}; use mutual_nearest")
    (rows, a), (columns, b) = _directions(first, second)
    cosines = a @ b.T
    i, j = (torch.as_tensor(side, device=a.device) for side in linear_sum_assignment(-cosines.cpu().double().numpy()))
    return Matches(rows[i], columns[j], cosines[i, j].clamp(-1, 1))


def _directions(first: Tensor, second: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of each decoder the indices of the rows that are not zero, and those at unit length in fp32."""
    found = []
    for name, decoder in (("first", first), ("second", second)):
        if decoder.dim() != 2 or not decoder.is_floating_point() or decoder.shape[1] != first.shape[-1]:
            raise ValueError(
                f"{name}: got {decoder.dtype} {list(decoder.shape)}, expected floating point decoder rows "
                f"[F, {first.shape[-1]}]; both SAEs have to write to one residual stream"
            )
        if not decoder.isfinite().all():
            raise ValueError(f"{name}: NaN or Inf in the decoder")
        wide = decoder.float()
        norm = wide.norm(dim=1, keepdim=True)
        there = norm.squeeze(1).nonzero().squeeze(1)
        found.append((there, wide[there] / norm[there]))
    return found
