"""Refusal elasticity and rates: examples by hand, scipy's interval, invariances, words that count and do not."""

import math

import numpy as np
import pytest
from scipy import stats

from lockin_fast.judges import Rating
from lockin_fast.lockin.intervals import bootstrap, wilson
from lockin_fast.lockin.refusal import (
    by_steering,
    disclaimer_rate,
    disclaimers,
    judged_refusal_rate,
    rate_of,
    refusal_elasticity,
    refusal_rate,
)

NO = "I'm sorry, but I can't help with that."
YES = "Of course. Mix flour and water, then knead."


def test_elasticity_by_hand():
    found = refusal_elasticity([1.0, 0.5, 0.5, 0.0])  # mean 0.5, distances 0.5 0 0 0.5
    assert (found.value, found.mean, found.spread, found.prompts, found.masked) == (0.5, 0.5, 0.25, 4, 0)
    assert refusal_elasticity([0.9, 0.6, 0.6]).value == pytest.approx(1 - 2 * (0.2 + 0.1 + 0.1) / 3, abs=1e-15)


def test_the_ends_of_its_range():
    assert refusal_elasticity([0, 1, 0, 1]).value == 0
    never = refusal_elasticity([0.0] * 5)
    assert never.value == 1 and never.interval == (1, 1) and never.mean == 0


@pytest.mark.parametrize("seed", range(20))
def test_elasticity_lies_in_its_range_and_knows_no_order_nor_which_side_is_refusal(seed):
    rng = np.random.default_rng(seed)
    p = rng.beta(*rng.uniform(0.05, 3, 2), size=rng.integers(2, 30))
    found = refusal_elasticity(p, resamples=200)
    assert 0 <= found.interval[0] <= found.interval[1] <= 1 and 0 <= found.value <= 1
    assert refusal_elasticity(rng.permutation(p), resamples=1).value == pytest.approx(found.value, abs=1e-14)
    assert refusal_elasticity(1 - p, resamples=1).value == pytest.approx(found.value, abs=1e-14)
    # Half as far from their mean: half as far from 1.
    assert 1 - refusal_elasticity((p + p.mean()) / 2, resamples=1).value == pytest.approx((1 - found.value) / 2)


def test_masked_steering_prompts_are_left_out_and_counted():
    plain, masked = refusal_elasticity([0.2, 0.8]), refusal_elasticity([0.2, None, 0.8, math.nan])
    assert masked.masked == 2 and (masked.value, masked.interval) == (plain.value, plain.interval)


@pytest.mark.parametrize(
    "p, message",
    [
        ([], "got no steering prompt"),
        ([0.5], "1 of 1 steering prompts were measured"),
        ([None, math.nan, 1.0], "1 of 3"),
        ([0.1, 1.2], "from 0 to 1, got 1.2"),
        ([0.1, -math.inf], "from 0 to 1, got -inf"),
    ],
)
def test_elasticity_refuses(p, message):
    with pytest.raises(ValueError, match=message):
        refusal_elasticity(p)


def test_the_sampling_error_of_few_replies_is_as_large_as_said():
    m, rng = 16, np.random.default_rng(5)
    found = [refusal_elasticity(rng.binomial(m, 0.5, 400) / m, resamples=1).value for _ in range(20)]
    exact = 1 - math.comb(m, m // 2) / 2**m  # De Moivre: mean distance of m / 2 * comb(m, m / 2) / 2^m successes
    assert np.mean(found) == pytest.approx(exact, abs=5 * np.std(found) / math.sqrt(20))
    assert 1 - exact == pytest.approx(0.8 / math.sqrt(m), abs=0.005)


def test_the_bootstrap_is_scipys_percentile():
    values = np.random.default_rng(0).random(40)
    mine = bootstrap(values, lambda drawn: drawn.mean(-1), level=0.9, resamples=20000, seed=3)
    theirs = stats.bootstrap(
        (values,), np.mean, confidence_level=0.9, n_resamples=20000, method="percentile", rng=np.random.default_rng(9)
    ).confidence_interval
    assert mine == pytest.approx(tuple(theirs), abs=0.004)  # five standard errors of a quantile of 20,000 draws
    assert mine == bootstrap(values, lambda drawn: drawn.mean(-1), level=0.9, resamples=20000, seed=3)
    with pytest.raises(ValueError, match="resamples"):
        refusal_elasticity([0, 1], resamples=0)
    with pytest.raises(ValueError, match="level"):
        refusal_elasticity([0, 1], level=1.0)


@pytest.mark.parametrize("successes, count, level", [(0, 1, 0.95), (0, 30, 0.95), (7, 20, 0.9), (50, 50, 0.99)])
def test_wilson_is_scipys(successes, count, level):
    theirs = stats.binomtest(successes, count).proportion_ci(level, method="wilson")
    assert wilson(successes / count, count, level) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize("share, count, level", [(1.1, 5, 0.9), (math.nan, 5, 0.9), (0.5, 0, 0.9), (0.5, 5, 0.0)])
def test_wilson_refuses(share, count, level):
    with pytest.raises(ValueError, match="share|level"):
        wilson(share, count, level)


def test_refusal_probabilities_of_steering_prompts_by_hand():
    shares = [True, False, 0.5, None, math.nan, 1.0]
    assert by_steering(shares, ["a", "a", "b", "b", "c", "a"]) == {"a": 2 / 3, "b": 0.5, "c": None}
    with pytest.raises(ValueError, match="2 names for 1 replies"):
        by_steering([True], ["a", "b"])


def test_rates_by_hand():
    found = refusal_rate([NO, YES, YES, NO, None, "  \n", ""])
    assert (found.value, found.count, found.masked) == (0.5, 4, 3) and found.interval == wilson(0.5, 4)
    judged = judged_refusal_rate([Rating(0, 0, 1), Rating(0, 0, 0.5), Rating(math.nan, math.nan, math.nan)])
    assert (judged.value, judged.count, judged.masked) == (0.75, 2, 1)
    assert disclaimer_rate([YES, "As an AI, I like bread.", YES, YES]).value == 0.25


def test_rates_refuse_when_nothing_was_measured():
    for replies in ([], [None, " "]):
        with pytest.raises(ValueError, match=f"none of {len(replies)} was measured"):
            refusal_rate(replies)
    with pytest.raises(ValueError, match="from 0 to 1, got 0.5 to 2"):
        rate_of([0.5, 2.0])


@pytest.mark.parametrize(
    "reply",
    [
        "As an AI language model I find tea agreeable.",
        "I’m just an AI, so take it lightly.",
        "I don't have personal opinions, but many prefer tea.",
        "My knowledge cutoff is in spring.",
        "I do not have access to real-time data.",
        "I cannot verify this.",
        "I'm not a licensed financial advisor.",
        "This is not a substitute for professional medical advice.",
        "Drink water. This is not medical advice.",
        "This does not constitute legal advice.",
        "Please consult with a qualified tax professional first.",
        "You should see your doctor.",
        "Seek professional help.",
        "This is for informational and educational purposes only.",
        "Try it at your own risk.",
        "Disclaimer: results vary.",
    ],
)  # fmt: skip
def test_disclaimers_are_told_by_their_words(reply):
    assert disclaimers([reply]) == [True]


@pytest.mark.parametrize(
    "reply",
    [
        YES,
        "The doctor in the story sees a patient.",
        "It is important to note that bread rises.",
        "My advice: knead longer.",
        "An AI wrote a poem.",
        "She is not a lawyer but a baker.",
        "Contact your neighbour.",
    ],
)
def test_plain_answers_have_none(reply):
    assert disclaimers([reply]) == [False]
