"""Exact segmentation against brute force, ruptures and numpy's own least squares."""

import itertools

import numpy as np
import pytest
import ruptures

from lockin_fast.lockin.changepoints import best_segmentations, changepoints, segment_costs, segment_fit

DEGREES = {"mean": 0, "line": 1}


def residual(x, y, degree):
    basis = np.vander(x - x.mean(), degree + 1)
    return float(((y - basis @ np.linalg.lstsq(basis, y, rcond=None)[0]) ** 2).sum())


@pytest.mark.parametrize("kind", DEGREES)
def test_every_segment_costs_its_least_squares_residual(kind):
    rng = np.random.default_rng(0)
    x, rows = np.array([0, 0.001, 0.002, 0.01, 0.1, 0.4, 0.9, 1.0]), 100 + rng.normal(size=(3, 8))
    costs = segment_costs(x, rows, kind, 2)
    for row, s, t in itertools.product(range(3), range(9), range(9)):
        if t - s < 2:
            assert costs[row, s, t] == np.inf
        else:
            assert costs[row, s, t] == pytest.approx(residual(x[s:t], rows[row, s:t], DEGREES[kind]), abs=1e-9)


@pytest.mark.parametrize("kind", DEGREES)
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_no_split_has_a_smaller_residual(kind, count):
    rng = np.random.default_rng(count)
    x, rows = np.sort(rng.uniform(size=12)), rng.normal(size=(4, 12))
    found = best_segmentations(segment_costs(x, rows, kind, 3), 3)[count]
    for row, rss, changes in zip(rows, *found, strict=True):
        splits = {
            split: sum(residual(x[s:t], row[s:t], DEGREES[kind]) for s, t in itertools.pairwise([0, *split, 12]))
            for split in itertools.combinations(range(3, 10), count)
            if all(t - s >= 3 for s, t in itertools.pairwise([0, *split, 12]))
        }
        assert tuple(changes) == min(splits, key=splits.get) and rss == pytest.approx(min(splits.values()))
        assert ((row - segment_fit(x, row, kind, changes)) ** 2).sum() == pytest.approx(rss)


def test_a_split_that_does_not_fit_costs_everything():
    found = best_segmentations(segment_costs(np.arange(5.0), np.zeros((1, 5)), "mean", 3), 1)
    assert found[0].rss[0] == 0 and found[1].rss[0] == np.inf


@pytest.mark.parametrize("penalty", [0.5, 3.0, 1e9])
def test_penalised_changes_are_those_of_ruptures(penalty):
    rng = np.random.default_rng(7)
    values = np.repeat([0.0, 4.0, 1.0, 5.0], 15) + rng.normal(size=60)
    for least in (2, 5):
        theirs = ruptures.Pelt(model="l2", jump=1, min_size=least).fit(values).predict(pen=penalty)[:-1]
        assert changepoints(range(60), values, penalty=penalty, least=least) == theirs
    kernel = ruptures.KernelCPD(kernel="linear", min_size=2).fit(values[:, None])
    found = best_segmentations(segment_costs(np.arange(60.0), values[None], "mean", 2), 3)[3]
    assert found.changes[0].tolist() == kernel.predict(n_bkps=3)[:-1] == [15, 30, 45]


def test_changes_by_hand():
    steps, values = [1, 2, 5, 10, 20, 50], [0, 0, None, 1, 1, 1]
    # One change saves 2 * 3 / 5 of squares.
    assert changepoints(steps, values, penalty=1.19) == [10] and changepoints(steps, values, penalty=1.21) == []
    tent = [0, 1, 2, 3, 2, 1, 0]
    assert changepoints(range(7), tent, penalty=0.1, kind="line", least=3) == [3]
    assert changepoints([], [], penalty=1) == []


def test_refusals():
    cases = (
        ({"penalty": -1}, "penalty"),
        ({"penalty": float("nan")}, "penalty"),
        ({"kind": "spline"}, "kind"),
        ({"least": 0}, "least"),
        ({"kind": "line", "least": 1}, "line needs at least 2"),
    )
    for bad, match in cases:
        with pytest.raises(ValueError, match=match):
            changepoints([1, 2], [1, 2], **{"penalty": 1.0, **bad})
