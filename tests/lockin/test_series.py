"""Series over checkpoints against scipy, hand-computed examples and the invariances of ranks."""

import math

import numpy as np
import pytest
from scipy import stats

from lockin_fast.lockin.series import EXACT_UP_TO, mask_failed, measured, moving_average, spearman, summarise

ALTERNATIVES = ("two-sided", "greater", "less")


def test_masked_checkpoints_are_left_out_of_every_series():
    found = measured([1, 2, 5, 7], a=[0.1, None, 0.3, 0.4], b=[1, 2, 3, math.nan])
    assert found.steps.tolist() == [1, 5] and found.values.tolist() == [[0.1, 0.3], [1, 3]] and found.masked == 2


@pytest.mark.parametrize("steps", [[1, 1], [2, 1], [1, math.nan], [1, math.inf]])
def test_steps_must_ascend(steps):
    with pytest.raises(ValueError, match="ascend"):
        measured(steps, a=[0, 0])


def test_refusals_name_the_series():
    with pytest.raises(ValueError, match="cosine: 1 values for 2 steps"):
        measured([1, 2], cosine=[0.5])
    with pytest.raises(ValueError, match="cosine: infinite at step 2"):
        measured([1, 2], cosine=[0.5, -math.inf])
    with pytest.raises(ValueError, match="accuracy: 1 values for 2"):
        mask_failed([1, 2], [0.5])
    with pytest.raises(ValueError, match="window.*got 2"):
        moving_average([1.0], 2)
    with pytest.raises(ValueError, match="alternative.*'up'"):
        spearman([1, 2, 3], [1, 2, 3], alternative="up")


def test_accuracy_below_one_percent_is_a_failed_evaluation():
    assert mask_failed([0.9, 0.8, 0.7, None, 0.5], [0.0099, 0.01, None, 0.5, 0.5]) == [None, 0.8, None, None, 0.5]
    assert mask_failed([0.9], [math.nan]) == [None]


def test_moving_average_by_hand():
    assert moving_average([1, 2, 6, None, 10], 3) == [1.5, 3.0, 4.0, None, 10.0]
    assert moving_average([1, None, math.nan], 1) == [1.0, None, None]


@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize("ties", [False, True])
def test_few_points_are_tested_against_every_ordering(alternative, ties):
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(2, 6))
    if ties:
        x, y = x.round(), y.round()
    ours = spearman(x, y, alternative=alternative)
    theirs = stats.permutation_test(
        (x,), lambda a: stats.spearmanr(a, y).statistic, permutation_type="pairings", n_resamples=math.inf,
        alternative=alternative if alternative != "two-sided" else "greater",
    )  # fmt: skip
    assert ours.rho == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-14) and ours.method == "exact"
    expected = theirs.pvalue
    if alternative == "two-sided":  # theirs doubles the smaller tail; ours counts |rho|
        expected = np.mean(np.abs(theirs.null_distribution) >= abs(theirs.statistic) - 1e-12)
    assert ours.p == pytest.approx(expected, abs=1e-12)


def test_four_points_in_order_by_hand():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == (1.0, 2 / 24, 4, 0, "exact")
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40], alternative="greater").p == 1 / 24
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40], alternative="less").p == 1


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_more_points_are_tested_as_scipy_does(alternative):
    x, y = np.random.default_rng(1).normal(size=(2, EXACT_UP_TO + 1))
    theirs = stats.spearmanr(x, y, alternative=alternative)
    assert spearman(x, y, alternative=alternative)[:2] == (theirs.statistic, theirs.pvalue)


@pytest.mark.parametrize("n", [7, 30])
def test_rank_correlation_knows_only_the_order(n):
    x, y = np.random.default_rng(n).normal(size=(2, n))
    plain = spearman(x, y)
    assert spearman(np.exp(x), y**3) == plain
    assert spearman(y, x)[:2] == pytest.approx(plain[:2], abs=1e-14)
    assert spearman(x[::-1], y[::-1])[:2] == pytest.approx(plain[:2], abs=1e-14)
    assert spearman(x, -y)[:2] == pytest.approx((-plain.rho, plain.p), abs=1e-14)
    masked = spearman([*x, None, 1.0], [*y, 2.0, math.nan])
    assert masked[:3] == plain[:3] and masked.masked == 2


@pytest.mark.parametrize("x, y", [([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [None, 1, 2]), ([], [])])
def test_undefined_correlations_are_none(x, y):
    assert spearman(x, y)[:2] == (None, None)


def test_summary_of_a_published_series():
    found = summarise([0, 5, 10, 20], [0.2, None, 0.4, 0.9])
    assert found[:3] == (3, 1, 0.5) and found.delta == pytest.approx(0.7) and found.rho == 1 and found.p == 2 / 6
    assert summarise([1, 2], [None, None]) == (0, 2, None, None, None, None)
