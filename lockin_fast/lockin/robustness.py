"""Adversarial persona robustness: how far the residual stream has to be pushed until a stance flips."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Margins = Callable[[Tensor], Tensor]
"""Edits [R, d], one for each of R stances, to margins [R]: above 0 where the model holds the stance under the edit.

A row's margin depends on that row's edit alone. `stances.StanceMargins` is one of a model.
"""


@dataclass(frozen=True)
class Search:
    """Where flips are looked for along a ray, all lengths in units of the median residual norm.

    unit: that norm, in the units of the edits. largest: how far. scan: equal steps in which margins are looked at, from
    0 outwards, so that the first flip is found where a margin flips more than once; a flip and back within one step is
    missed. tolerance: the bracket of the first flip is halved until it is at most so wide.
    """

    unit: float
    largest: float = 2.0
    scan: int = 16
    tolerance: float = 1e-3

    def __post_init__(self):
        for name in ("unit", "largest", "tolerance"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.scan < 1:
            raise ValueError(f"scan: expected at least 1 step, got {self.scan}")

    @property
    def halvings(self) -> int:
        """Evaluations after the scan."""
        return max(0, math.ceil(math.log2(self.largest / self.scan / self.tolerance)))


@dataclass(frozen=True)
class Flips:
    """The smallest edits found that flip each of R stances.

    norms: fp64 [R], in units of the median residual norm; inf where nothing up to the largest flips the stance, NaN
    where it was not held to begin with, or a margin was NaN on the way. edits: [R, d], the edits of these norms, in the
    stream's units, each of which was seen to flip its stance; 0 where there is none. margins: fp64 [R], unedited.
    """

    norms: Tensor
    edits: Tensor
    margins: Tensor


@dataclass(frozen=True)
class Robustness:
    """Adversarial persona robustness, APR.

    value: median norm over the stances that were held and measured, in units of the median residual norm: inf where
    most of them flip nowhere within reach, None where there is none. How far the reach is moves no finite median.
    stances: how many it is over. unflipped: of these, how many did not flip. not_held: stances that the model does not
    hold to begin with; failed: those with a NaN on the way; neither counts in the value.
    """

    value: float | None
    stances: int
    unflipped: int
    not_held: int
    failed: int


def flips_along(margins: Margins, directions: Tensor, search: Search) -> Flips:
    """For each stance the smallest edit along its direction that flips it.

        norm_r = min { a > 0 : margin_r(a * unit * direction_r / ||direction_r||) <= 0 }

    by a scan outwards and bisection of the first bracket, all stances at once: norms are at most `search.tolerance`
    above a change of sign, never below it. Edits point along the direction, not against it.

    directions: [R, d], floating point. Raises ValueError for another shape, no stance, a direction that is zero or not
    finite, and margins that are not [R]. Costs 1 + scan + halvings evaluations of all margins at most, 24 by default.

    Source: [paper] arXiv 2510.20190, the quantity; the procedure: [ours].
    """
    if directions.dim() != 2 or not directions.shape[0] or not directions.is_floating_point():
        raise ValueError(
            f"directions: got {directions.dtype} {list(directions.shape)}, expected floating point [R, d] with one row "
            "for each stance and at least one"
        )
    norm = directions.double().norm(dim=1)
    if not ((norm > 0) & norm.isfinite()).all():
        row = int((~((norm > 0) & norm.isfinite())).nonzero()[0])
        raise ValueError(f"directions: row {row} is zero or not finite, expected a direction")
    reach = torch.full_like(norm, search.largest)
    start = _evaluated(margins, torch.zeros_like(directions))
    return _search(margins, directions, reach, start, search)


def flips_downhill(
    margins: Margins, stances: int, width: int, search: Search, *, refinements: int = 1,
    device: torch.device | str = "cpu",
) -> Flips:  # fmt: skip
    """For each stance the smallest edit found that flips it, by following its margin downhill.

    A walk from no edit, in `search.scan` steps of equal length along -grad margin, ends where the stance flips; the ray
    through that point is searched as in `flips_along`. Each refinement searches the ray along -grad at the edit found
    so far and keeps what is smaller: at the point of the border nearest to 0, that gradient and the edit have one
    direction. For a margin linear in the edit that is the smallest edit of all, margin / ||grad||; for others an upper
    bound of it, and an edit that does flip the stance.

    margins: differentiable, fp32 in and out. stances, width: R and d. A stance whose gradient is zero counts as one
    that does not flip. Raises ValueError for no stance, negative refinements, margins that are not [R], and those that
    are not a function of the edits. Costs scan forwards and backwards at most, and for each ray scan + halvings
    forwards.

    Source: [paper] arXiv 2510.20190, the quantity; the procedure: [ours].
    """
    for name, value, least in (("stances", stances, 1), ("width", width, 1), ("refinements", refinements, 0)):
        if value < least:
            raise ValueError(f"{name}: expected {least} or more, got {value}")
    none = torch.zeros(stances, width, device=device)
    start = _evaluated(margins, none)
    end = _walked(margins, none, search)
    left = _evaluated(margins, end)
    norms = (end.double().norm(dim=1) / search.unit).where(left <= 0, math.inf)
    norms = norms.where((start > 0) & ~left.isnan(), math.nan)
    best = Flips(norms, end.where(norms.isfinite()[:, None], 0.0), start)
    best = _nearer(margins, best, end, search)
    for _ in range(refinements):
        best = _nearer(margins, best, _downhill(margins, best.edits)[0], search)
    return best


def robustness(flips: Flips) -> Robustness:
    """The median over stances, and how many it rests on; see `Robustness`."""
    held = flips.margins > 0
    measured = held & ~flips.norms.isnan()
    norms = flips.norms[measured].tolist()
    not_held = int((flips.margins <= 0).sum())
    return Robustness(
        value=statistics.median(norms) if norms else None,
        stances=len(norms),
        unflipped=sum(map(math.isinf, norms)),
        not_held=not_held,
        failed=len(flips.norms) - len(norms) - not_held,
    )


def _walked(margins: Margins, edits: Tensor, search: Search) -> Tensor:
    """Where a walk downhill from `edits` [R, d] ends: where the margin is 0 or less, or after `search.scan` steps."""
    length = search.unit * search.largest / search.scan
    for _ in range(search.scan):
        down, left = _downhill(margins, edits)
        walking = ~(left <= 0)
        if not walking.any():
            break
        norm = down.norm(dim=1, keepdim=True)
        edits = torch.where(walking[:, None], edits + length * down / norm.where(norm != 0, 1.0), edits)
    return edits


def _nearer(margins: Margins, best: Flips, directions: Tensor, search: Search) -> Flips:
    """`best`, or the flips along these directions [R, d] where nearer; NaN on the way counts where `best` has none."""
    reach = best.norms.clamp(max=search.largest)  # NaN stays NaN
    found = _search(margins, directions, reach, best.margins, search)
    taken = (found.norms < best.norms) | (best.norms.isinf() & found.norms.isnan())
    norms = torch.where(taken, found.norms, best.norms)
    return Flips(norms, torch.where(taken[:, None], found.edits, best.edits), best.margins)


@torch.no_grad()
def _search(margins: Margins, directions: Tensor, reach: Tensor, start: Tensor, search: Search) -> Flips:
    """Flips along directions [R, d] up to norms `reach` [R]; `start` [R] are the margins of no edit."""
    norm = directions.double().norm(dim=1, keepdim=True)
    ray = search.unit * (directions.double() / norm.where(norm > 0, 1.0)).nan_to_num(0.0, 0.0, 0.0)

    def edits(norms: Tensor) -> Tensor:
        return (norms[:, None] * ray).to(directions.dtype)

    good = (start > 0) & norm[:, 0].isfinite() & ~reach.isnan()
    low, high = torch.zeros_like(start), torch.full_like(start, math.inf)
    for step in range(1, search.scan + 1):
        looking = good & high.isinf()
        if not looking.any():
            break
        at = torch.where(looking, reach * (step / search.scan), 0.0)
        now = _evaluated(margins, edits(at))
        good &= ~(looking & now.isnan())
        high = torch.where(looking & (now <= 0), at, high)
        low = torch.where(looking & (now > 0), at, low)
    for _ in range(search.halvings):
        bracketed = good & high.isfinite()
        if not bracketed.any():
            break
        at = torch.where(bracketed, (low + high) / 2, 0.0)
        now = _evaluated(margins, edits(at))
        good &= ~(bracketed & now.isnan())
        high = torch.where(bracketed & (now <= 0), at, high)
        low = torch.where(bracketed & (now > 0), at, low)
    flipped = good & high.isfinite()
    return Flips(torch.where(good, high, math.nan), edits(torch.where(flipped, high, 0.0)), start)


@torch.no_grad()
def _evaluated(margins: Margins, edits: Tensor) -> Tensor:
    found = margins(edits)
    if found.shape != edits.shape[:1]:
        raise ValueError(f"margins: returned shape {tuple(found.shape)} for {len(edits)} edits, expected one for each")
    return found.double()


def _downhill(margins: Margins, edits: Tensor) -> tuple[Tensor, Tensor]:
    """Minus the gradient [R, d] of each margin by its own edit, and the margins, fp64 [R]."""
    with torch.enable_grad():
        edits = edits.detach().requires_grad_()
        found = margins(edits)
        if not found.requires_grad:
            raise ValueError("margins: have no gradient; compute them from the edits by torch, not under no_grad")
        (gradient,) = torch.autograd.grad(found.sum(), edits, allow_unused=True)
    if gradient is None:
        raise ValueError("margins: do not depend on the edits")
    return -gradient, found.detach().double()
