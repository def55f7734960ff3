"""Smallest flips: analytic norms of linear and curved margins, margins that flip twice, and what is masked."""

import math

import pytest
import torch

from lockin_fast.lockin.robustness import Flips, Search, flips_along, flips_downhill, robustness

SEARCH = Search(unit=2.5)


def linear(count=7, width=5, seed=0):
    """(margins, slopes, offsets): margin_r = offset_r - slope_r . edit_r."""
    generator = torch.Generator().manual_seed(seed)
    slopes = torch.randn(count, width, generator=generator)
    offsets = slopes.norm(dim=1) * SEARCH.unit * torch.linspace(0.05, 1.9, count)  # flip at these norms downhill
    return (lambda edits: offsets.to(edits) - (slopes.to(edits) * edits).sum(1)), slopes, offsets


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-5])
def test_a_linear_margin_flips_at_its_analytic_norm(seed, tolerance):
    margins, slopes, offsets = linear(seed=seed)
    directions = slopes + 0.3 * torch.randn(slopes.shape, generator=torch.Generator().manual_seed(seed + 50))
    search = Search(unit=2.5, largest=4.0, tolerance=tolerance)
    exact = offsets / (slopes * directions / directions.norm(dim=1, keepdim=True)).sum(1) / search.unit
    found = flips_along(margins, directions, search)
    above = found.norms - exact
    rounding = 16 * torch.finfo().eps * exact
    assert (above >= -rounding).all() and (above <= tolerance + rounding).all()
    assert (margins(found.edits) <= 0).all()
    assert torch.allclose(found.edits.norm(dim=1).double() / search.unit, found.norms, rtol=1e-6)


def test_downhill_a_linear_margin_needs_its_margin_over_its_slope():
    margins, slopes, offsets = linear()
    found = flips_downhill(margins, *slopes.shape, SEARCH, refinements=0)
    exact = torch.linspace(0.05, 1.9, 7).double()
    assert (found.norms - exact).abs().max() <= SEARCH.tolerance + 1e-6
    along = flips_along(margins, torch.randn(slopes.shape, generator=torch.Generator().manual_seed(1)), SEARCH)
    assert (along.norms >= found.norms - SEARCH.tolerance).all()  # no direction is steeper
    assert robustness(found).value == pytest.approx(exact.median().item(), abs=SEARCH.tolerance)


def test_the_norm_is_in_units_and_does_not_depend_on_the_length_of_a_direction():
    margins, slopes, _ = linear()
    found = flips_along(margins, slopes, Search(unit=2.5, largest=2.0))
    other = flips_along(margins, 17 * slopes, Search(unit=5.0, largest=1.0, tolerance=5e-4))
    assert torch.allclose(found.norms, 2 * other.norms, rtol=1e-6)


def curved(edits):
    x, y = edits.unbind(1)
    return 2 - x - 0.2 * y - 3 * y**2


def test_refinements_come_closer_to_the_nearest_point_of_a_curved_border():
    angle = torch.linspace(0, 2 * math.pi, 200_001, dtype=torch.float64)
    x, y = angle.cos(), angle.sin()
    b = x + 0.2 * y  # 3 y^2 s^2 + b s - 2 = 0 along the ray of this angle
    nearest = (4 / (b + (b**2 + 24 * y**2).sqrt())).where(y.abs() > 1e-3, math.inf).min().item()
    search = Search(unit=1.0, largest=4.0)
    norms = [flips_downhill(curved, 1, 2, search, refinements=n).norms.item() for n in (0, 1, 3, 7)]
    straight = flips_along(curved, torch.tensor([[1.0, 0.2]]), search).norms.item()  # minus the gradient at no edit
    assert straight > 1.5 * nearest and norms[0] < straight
    assert norms == sorted(norms, reverse=True) and norms[1] < norms[0]
    assert nearest <= norms[-1] <= nearest + 0.01


def saturating(edits):
    x, y = edits.unbind(1)
    return 1.2 - 0.9 * torch.tanh(3 * x) - 0.9 * torch.tanh(0.5 * y)


def test_the_walk_gets_round_a_bend_where_the_straight_ray_misses_the_border():
    search = Search(unit=1.0)
    assert flips_along(saturating, torch.tensor([[2.7, 0.45]]), search).norms.isinf().all()
    grid = torch.cartesian_prod(*[torch.linspace(0, 2, 501, dtype=torch.float64)] * 2)
    nearest = grid[saturating(grid) <= 0].norm(dim=1).min().item()
    found = flips_downhill(saturating, 2, 2, search)
    assert (saturating(found.edits) <= 0).all() and found.norms[0] == found.norms[1]
    assert nearest - 0.006 <= found.norms[0] <= 1.1 * nearest  # the grid's diagonal is 0.006


def test_the_first_of_several_flips_is_found():
    def margins(edits):  # flips at 0.5, back at 1.0, again at 1.5
        return torch.cos(math.pi * edits[:, 0])

    found = flips_along(margins, torch.tensor([[1.0, 0.0]]), Search(unit=1.0, largest=3.0))
    assert found.norms.item() == pytest.approx(0.5, abs=1e-3)


def test_what_is_not_held_does_not_flip_or_fails_is_told_apart():
    offsets = torch.tensor([1.0, 3.0, 0.0, -1.0, math.nan, 0.5, 1.2])

    def margins(edits):
        found = offsets - edits[:, 0]
        return torch.where(torch.tensor([0, 0, 0, 0, 0, 1, 0]).bool() & (edits[:, 0] > 0.2), math.nan, found)

    found = flips_along(margins, torch.ones(7, 1), Search(unit=1.0))
    assert found.norms.isnan().tolist() == [False, False, True, True, True, True, False]
    assert found.norms[1] == math.inf and (found.edits[1:6] == 0).all()
    summary = robustness(found)
    assert (summary.stances, summary.unflipped, summary.not_held, summary.failed) == (3, 1, 2, 2)
    assert summary.value == found.norms[6].item()
    downhill = flips_downhill(margins, 7, 1, Search(unit=1.0))
    assert torch.allclose(downhill.norms, found.norms, atol=1e-3, equal_nan=True)


def test_a_nan_inside_the_bracket_is_a_failure_not_a_norm():
    def margins(edits):
        found = 1 - edits[:, 0]
        return torch.where((edits[:, 0] > 0.95) & (edits[:, 0] < 0.99), math.nan, found)

    assert flips_along(margins, torch.ones(1, 1), Search(unit=1.0, scan=2)).norms.isnan().all()


def test_a_nan_that_a_refinement_runs_into_leaves_the_flip_that_was_found():
    search = Search(unit=1.0, largest=4.0)
    first, second = (flips_downhill(curved, 1, 2, search, refinements=n) for n in (0, 1))
    slope = torch.cat([first.edits, second.edits]).unbind(1)
    between = (slope[1] / slope[0]).mean()

    def margins(edits):
        return torch.where(edits[:, 1] > between * edits[:, 0], math.nan, curved(edits))

    assert second.norms < first.norms
    assert torch.equal(flips_downhill(margins, 1, 2, search, refinements=1).norms, first.norms)


def test_medians_of_stances_that_do_not_flip():
    def of(*norms):
        norms = torch.tensor(norms, dtype=torch.float64)
        return robustness(Flips(norms, torch.zeros(len(norms), 1), torch.ones_like(norms)))

    assert of(0.5, math.inf, 1.0).value == 1.0
    assert of(0.5, math.inf, math.inf).value == math.inf
    assert of(math.nan).value is None and of(math.nan).failed == 1


def test_a_margin_without_slope_does_not_flip():
    found = flips_downhill(lambda edits: 1 - 0 * edits[:, 0], 2, 3, SEARCH)
    assert found.norms.tolist() == [math.inf, math.inf]


def test_evaluations_are_as_many_as_said():
    calls = []

    def margins(edits):
        calls.append(len(edits))
        return 10 - edits[:, 0]

    search = Search(unit=1.0, scan=10, tolerance=0.05)
    assert search.halvings == 2
    flips_along(margins, torch.ones(3, 1), search)
    assert calls == [3] * 11  # nothing to halve
    calls.clear()
    flips_along(lambda edits: margins(edits) - 8.1, torch.ones(3, 1), search)
    assert calls == [3] * 13


@pytest.mark.parametrize(
    "options", [{"unit": 0.0}, {"unit": math.nan}, {"largest": -1.0}, {"tolerance": 0.0}, {"scan": 0}]
)
def test_a_search_that_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: expected"):
        Search(**{"unit": 1.0, **options})


@pytest.mark.parametrize(
    "directions, message",
    [
        (torch.ones(0, 3), "at least one"),
        (torch.ones(3), r"\[R, d\]"),
        (torch.ones(2, 3, dtype=torch.int64), "int64"),
        (torch.tensor([[1.0, 0.0], [0.0, 0.0]]), "row 1 is zero"),
        (torch.tensor([[math.nan, 0.0], [1.0, 0.0]]), "row 0 is zero or not finite"),
    ],
)
def test_directions_are_checked_before_any_work(directions, message):
    with pytest.raises(ValueError, match=message):
        flips_along(None, directions, SEARCH)


def test_margins_are_checked():
    with pytest.raises(ValueError, match=r"margins: returned shape \(2, 3\) for 2 edits"):
        flips_along(lambda edits: edits, torch.ones(2, 3), SEARCH)
    with pytest.raises(ValueError, match="have no gradient"):
        flips_downhill(lambda edits: edits[:, 0].detach() + 1, 2, 3, SEARCH)
    with pytest.raises(ValueError, match="do not depend on the edits"):
        flips_downhill(lambda edits: torch.ones(2, requires_grad=True), 2, 3, SEARCH)
    for options in ((0, 3, 1), (2, 0, 1), (2, 3, -1)):
        with pytest.raises(ValueError, match="expected . or more, got"):
            flips_downhill(None, *options[:2], SEARCH, refinements=options[2])
