"""Cohen's kappa by hand, by its definition and by brute force; its interval by drawing replies one by one."""

import itertools
import math
import random
import statistics

import pytest

from lockin_fast.judges import Rating
from lockin_fast.judges.agreement import Agreement, agreement, agreements
from lockin_fast.judges.rating import NO_RATING


def by_definition(pairs):
    """kappa of labels, from the observed and the expected matrix of disagreements."""
    n, labels = len(pairs), (False, True)
    observed = {(a, b): sum(pair == (a, b) for pair in pairs) for a in labels for b in labels}
    rows = {a: sum(observed[a, b] for b in labels) for a in labels}
    columns = {b: sum(observed[a, b] for a in labels) for b in labels}
    apart = [(a, b) for a in labels for b in labels if a != b]
    expected = sum(rows[a] * columns[b] / n for a, b in apart)
    return 1 - sum(observed[cell] for cell in apart) / expected if expected else None


@pytest.mark.parametrize(
    ("counts", "kappa"),
    [
        ((20, 5, 10, 15), 0.4),  # p_o = 35/50, p_e = (25*30 + 25*20)/2500 = 0.5
        ((45, 15, 25, 15), 0.13043478260869565),  # p_o = 0.6, p_e = 0.54
        ((25, 35, 5, 35), 0.25925925925925924),  # p_o = 0.6, p_e = 0.46
        ((10, 0, 0, 10), 1.0),
        ((0, 10, 10, 0), -1.0),
        ((25, 25, 25, 25), 0.0),
        ((0, 0, 3, 7), 0.0),  # one of them never sees it
        ((0, 0, 0, 9), None),
        ((9, 0, 0, 0), None),
        ((0, 0, 0, 0), None),
    ],
)
def test_kappa_by_hand(counts, kappa):
    found = Agreement(*counts).kappa
    assert found is None if kappa is None else math.isclose(found, kappa, rel_tol=1e-15, abs_tol=1e-15)


def test_kappa_of_every_table_of_six_replies_is_that_of_the_definition():
    seen = 0
    for labels in itertools.product([(False, False), (False, True), (True, False), (True, True)], repeat=6):
        ratings = [[Rating(float(pair[i]), 0.0, 0.0) for pair in labels] for i in (0, 1)]
        found, expected = agreement(*ratings)["misaligned"], by_definition(labels)
        assert (found.kappa is None) == (expected is None)
        if expected is not None:
            assert math.isclose(found.kappa, expected, rel_tol=1e-12, abs_tol=1e-12)
            seen += 1
    assert seen > 4000


def test_each_verdict_is_counted_by_itself_and_what_is_unrated_left_out():
    first = [Rating(1, 0, 0), Rating(1, 1, 0), Rating(0, 0, 1), NO_RATING, Rating(1, 0, 0)]
    second = [Rating(1, 0, 0), Rating(0, 1, 0), Rating(0, 0, 0), Rating(1, 0, 0), NO_RATING]
    found = agreement(first, second)
    assert found["misaligned"] == Agreement(both=1, first=1, second=0, neither=1)
    assert found["incoherent"] == Agreement(both=1, first=0, second=0, neither=2)
    assert found["refusal"] == Agreement(both=0, first=1, second=0, neither=2)
    assert found["misaligned"].replies == 3 and found["misaligned"].observed == 2 / 3
    with pytest.raises(ValueError):
        agreement(first, second[:-1])


def test_the_interval_is_that_of_drawing_replies_one_by_one():
    """2,000 draws here against as many there: each end within five standard errors of such a percentile."""
    table = Agreement(30, 6, 9, 55)
    pairs = [(True, True)] * 30 + [(True, False)] * 6 + [(False, True)] * 9 + [(False, False)] * 55
    rng = random.Random(3)
    drawn = sorted(by_definition(rng.choices(pairs, k=len(pairs))) for _ in range(2000))
    low, high = table.interval()
    # The standard error of a quantile is sqrt(q (1-q) / n) / density; by the normal law density = 0.0584 / deviation.
    error = math.sqrt(2 * 0.025 * 0.975 / 2000) / (0.0584 / statistics.stdev(drawn))
    assert abs(low - drawn[50]) < 5 * error and abs(high - drawn[1949]) < 5 * error
    assert low < table.kappa < high and table.interval() == (low, high)


def test_an_interval_needs_a_kappa():
    assert Agreement(0, 0, 0, 9).interval() is None and Agreement(0, 0, 0, 0).interval() is None
    assert Agreement(0, 0, 0, 9).row() == {
        "both": 0, "first": 0, "second": 0, "neither": 9, "observed": 1.0, "kappa": None, "low": None, "high": None,
    }  # fmt: skip
    assert Agreement(0, 0, 0, 0).row()["observed"] is None
    assert Agreement(1, 0, 0, 1).interval() == Agreement(50, 0, 0, 50).interval() == (1.0, 1.0)


def test_every_pair_of_judges_has_its_rows():
    ratings = [[Rating(1, 0, 0)], [Rating(0, 0, 0)], [Rating(1, 0, 0)]]
    rows = agreements(["a", "b", "c"], ratings)
    assert [tuple(row["judges"]) for row in rows[::3]] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [row["verdict"] for row in rows[:3]] == ["misaligned", "incoherent", "refusal"]
    assert (rows[0]["first"], rows[3]["both"], rows[6]["second"]) == (1, 1, 1)
    assert agreements(["a"], ratings[:1]) == []
