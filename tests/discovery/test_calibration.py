"""Calibration against curves that are known, and the selection rules on tables with a known answer."""

import random

import pytest

from lockin_fast.discovery.calibration import METHODS, calibrate_by_bisection, calibrate_by_grid
from lockin_fast.discovery.screen import Effect, effects, screening_doses
from lockin_fast.discovery.selection import Reduction, by_induction_and_repair, by_valid_reduction, halves
from lockin_fast.discovery.steered import PLAIN, Dose
from lockin_fast.judges import Rating

STRENGTHS = tuple(i / 10 for i in range(1, 16))


class Curves:
    """Stands for a model: the incoherent share under a dose is a function of latent and strength."""

    def __init__(self, incoherent, plain=0.0):
        self.incoherent, self.plain, self.asked = incoherent, plain, []

    def __call__(self, doses):
        self.asked.append(doses)
        return {d: Rating(0.0, self.plain if d == PLAIN else self.incoherent(*d), 0.0) for d in doses}


def rising(noise):
    """A random curve that never falls, and is zero up to a random strength."""
    zeros, lowest = noise.randrange(len(STRENGTHS) + 1), noise.random()
    rest = sorted(noise.uniform(lowest, 1.0) for _ in STRENGTHS[zeros:])
    return dict(zip(STRENGTHS, [0.0] * zeros + rest, strict=True))


@pytest.mark.parametrize("plain", [0.0, 0.25])
def test_bisection_finds_what_the_grid_finds_where_incoherence_only_rises(plain):
    noise = random.Random(0)
    curves = {latent: rising(noise) for latent in range(200)}
    found = {}
    for name, calibrate in METHODS.items():
        measure = Curves(lambda latent, strength: curves[latent][strength], plain)
        found[name], rates = calibrate(measure, list(curves), STRENGTHS, 0.1)
        assert rates.keys() == {dose for doses in measure.asked for dose in doses}
    assert found["bisection"] == found["grid"]
    for latent, strength in found["grid"].items():  # by hand
        fitting = [s for s in STRENGTHS if curves[latent][s] - plain <= 0.1]
        assert strength == (fitting[-1] if fitting else None)
    assert {None, STRENGTHS[0], STRENGTHS[-1]} < set(found["grid"].values())


def test_on_any_curve_neither_goes_beyond_the_budget():
    noise = random.Random(1)
    curves = {(latent, s): noise.random() for latent in range(200) for s in STRENGTHS}
    for calibrate in METHODS.values():
        found, _ = calibrate(Curves(lambda *dose: curves[dose], 0.2), range(200), STRENGTHS, 0.25)
        chosen = [(latent, s) for latent, s in found.items() if s is not None]
        assert all(curves[dose] - 0.2 <= 0.25 for dose in chosen) and len(chosen) > 50


def test_bisection_asks_for_few_doses_many_latents_at_a_time():
    measure = Curves(lambda latent, strength: float(strength > 0.1 * latent))
    found, _ = calibrate_by_bisection(measure, range(16), STRENGTHS, 0.1)
    assert found == {latent: (STRENGTHS[latent - 1] if latent else None) for latent in range(16)}
    assert len(measure.asked) == 4 and all(doses[0] == PLAIN and len(doses) <= 17 for doses in measure.asked)
    grid = Curves(lambda latent, strength: 0.0)
    calibrate_by_grid(grid, range(16), STRENGTHS, 0.1)
    assert [len(doses) for doses in grid.asked] == [1 + 16 * 15]


def test_one_strength_is_enough():
    for calibrate in METHODS.values():
        assert calibrate(Curves(lambda *dose: 0.0), [7], (0.5,), 0.1)[0] == {7: 0.5}
        assert calibrate(Curves(lambda *dose: 1.0), [7], (0.5,), 0.1)[0] == {7: None}


def test_effects_of_a_table_made_by_hand():
    rates = {
        PLAIN: Rating(0.5, 0.1, 0.0),
        Dose(3, 0.4): Rating(0.4, 0.1, 0.0), Dose(4, 0.4): Rating(0.7, 0.0, 0.0), Dose(5, 0.4): Rating(0.2, 0.0, 0.0),
        Dose(3, 0.8): Rating(0.1, 0.3, 0.0), Dose(4, 0.8): Rating(0.2, 0.2, 0.0), Dose(5, 0.8): Rating(0.2, 0.0, 0.0),
    }  # fmt: skip
    assert screening_doses([3, 4, 5], (0.4, 0.8)) == list(rates)
    repaired = effects(rates, [3, 4, 5], "repair", 0.125)
    assert [e.strength for e in repaired] == [0.4, 0.8, 0.4]  # beyond the budget; weaker first; equally good
    assert [e.gain for e in repaired] == pytest.approx([0.1, 0.3, 0.3])
    induced = effects(rates, [3, 4, 5], "induce", 0.125)
    assert [e.strength for e in induced] == [None, 0.4, None] and induced[1].gain == pytest.approx(0.2)


def test_indpp_ranks_by_the_sum_of_both_gains():
    induced = [Effect(0.0, None), Effect(0.25, 0.4), Effect(0.0, None), Effect(0.0, None)]
    repaired = [Effect(0.5, 0.8), Effect(0.5, 0.4), Effect(0.0, None), Effect(0.5, 0.4)]
    ranked = by_induction_and_repair([10, 11, 12, 13], induced, repaired)
    assert list(ranked.items()) == [(11, 0.75), (10, 0.5), (13, 0.5), (12, 0.0)]


def test_valid_reduction_keeps_those_that_do_both_and_ranks_by_the_held_out_reduction():
    found = [
        Reduction(1, 0.4, 0.4, induced=0.1, repaired=0.1, reduction=0.2),
        Reduction(2, 0.4, 0.4, induced=0.0, repaired=0.9, reduction=0.9),  # induces nothing
        Reduction(3, 0.4, 0.4, induced=0.9, repaired=0.0, reduction=0.9),  # repairs nothing
        Reduction(4, 0.4, 0.4, induced=-0.1, repaired=0.2, reduction=0.9),  # induces the opposite
        Reduction(5, 0.4, 1.5, induced=0.1, repaired=0.1, reduction=0.6),
        Reduction(6, 0.4, None, induced=0.1, repaired=0.0, reduction=None),  # beyond the budget at every strength
        Reduction(7, 0.1, 0.1, induced=0.1, repaired=0.1, reduction=-0.1),
    ]
    assert list(by_valid_reduction(found).items()) == [(5, 0.6), (1, 0.2), (7, -0.1)]
    assert by_valid_reduction([]) == {}


@pytest.mark.parametrize("count", [2, 3, 44])
def test_calibration_and_selection_have_no_prompt_in_common(count):
    tuning, selecting = halves(range(0, 3 * count, 3))
    assert sorted([*tuning, *selecting]) == list(range(0, 3 * count, 3))
    assert not set(tuning) & set(selecting) and abs(len(tuning) - len(selecting)) <= 1 and selecting
