"""The onset on series whose answer is known, its invariances, and each part of the test against an oracle."""

import dataclasses
import json
import math

import numpy as np
import pytest
from scipy import optimize, special

from lockin_fast.lockin.curves import smooth_fits
from lockin_fast.lockin.model_choice import criteria
from lockin_fast.lockin.onset import OnsetSettings, find_onset
from lockin_fast.lockin.resampling import autocorrelation, resampled
from lockin_fast.lockin.verdict import CANNOT_SAY, NOT_SUPPORTED, SUPPORTED, plain

QUICK = OnsetSettings(bootstrap=99)
I = np.arange(24.0)  # noqa: E741
PAPER = [1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 400, 500, 600]


def stepped(seed=0, size=6.0):
    return np.random.default_rng(seed).normal(size=24) + size * (I >= 10)


def test_a_large_step_is_found_where_it_is():
    found = find_onset(100 * I, stepped(), QUICK)
    assert found.verdict == SUPPORTED and (found.before, found.step) == (900, 1000)
    assert found.interval[0] <= 900 and 1000 <= found.interval[1] <= 1200
    assert found.p == 0.01 and found.aic_gain > 0 and found.bic_gain > 0
    (change,) = found.changes
    values = stepped()
    assert change.shift == pytest.approx(values[10:].mean() - values[:10].mean())
    pooled = math.sqrt((10 * values[:10].var() + 14 * values[10:].var()) / 22)  # Cohen's d, by its definition
    assert change.effect == pytest.approx(change.shift / pooled) and found.residual_sd == pytest.approx(pooled)


@pytest.mark.parametrize(
    "values",
    [0.3 * I, I**2, (I - 9) ** 3, 1 - np.exp(-I / 6), 1 / (1 + np.exp(-(I - 11.3) / 3.1)), np.log1p(I), -np.log1p(I)],
    ids=["line", "parabola", "cubic", "approach", "logistic", "logarithm", "falling"],
)
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_smooth_curves_have_no_onset(values, noise):
    noisy = values + noise * np.ptp(values) * np.random.default_rng(5).normal(size=24)
    assert find_onset(I, noisy, QUICK).verdict == NOT_SUPPORTED


def test_growth_with_the_logarithm_is_smooth_on_the_checkpoints_of_the_paper():
    assert find_onset(PAPER, np.log(PAPER), QUICK).verdict == NOT_SUPPORTED
    found = find_onset(PAPER, [float(step >= 50) for step in PAPER], QUICK)
    assert found.verdict == SUPPORTED and found.interval == (30, 50)


def test_two_changes_and_bends_are_found_when_asked_for():
    values = np.select([I < 8, I < 16], [0.0, 5.0], 9.0) + 0.3 * np.random.default_rng(2).normal(size=24)
    found = find_onset(I, values, dataclasses.replace(QUICK, most_changes=2))
    assert found.best == "means with 2 changes" and [change.step for change in found.changes] == [8, 16]
    assert found.step == 8
    bent = find_onset(I, np.maximum(I - 11, 0) + 0.01 * np.random.default_rng(0).normal(size=24), QUICK)
    assert bent.verdict == SUPPORTED and bent.best == "lines with 1 change" and abs(bent.step - 11) <= 1


def test_what_cannot_be_tested_is_said():
    few = find_onset(range(9), [1, 2, None, 3, float("nan"), 4, 5, 6, 7])
    assert few.verdict == CANNOT_SAY and "7 checkpoints were measured (2 masked); at least 8" in few.why
    assert find_onset(range(8), [0.7] * 8).why == "the series is constant"
    assert find_onset(range(8), [0.1 + 0.2] * 4 + [0.3] * 4).verdict == NOT_SUPPORTED  # they differ by rounding
    assert find_onset(range(8), [None] * 8).verdict == CANNOT_SAY


def same(a, b):
    assert (a.verdict, a.best, a.baseline, a.p) == (b.verdict, b.best, b.baseline, b.p)
    assert (a.aic_gain, a.bic_gain) == pytest.approx((b.aic_gain, b.bic_gain), rel=1e-6)


@pytest.mark.parametrize("size", [0.0, 1.5, 6.0])
def test_units_and_masked_checkpoints_change_nothing(size):
    values = stepped(3, size)
    plain_ = find_onset(I, values, QUICK)
    shifted = find_onset(I, 1000 - 64 * values, QUICK)
    same(shifted, plain_)
    assert [c.step for c in shifted.changes] == [c.step for c in plain_.changes]
    assert shifted.changes[0].shift == pytest.approx(-64 * plain_.changes[0].shift)
    assert shifted.residual_sd == pytest.approx(64 * plain_.residual_sd)
    moved = find_onset(50 + 8 * I, values, QUICK)
    same(moved, plain_)
    assert [c.step for c in moved.changes] == [50 + 8 * c.step for c in plain_.changes]
    masked = find_onset([*I[:5], 4.5, *I[5:]], [*values[:5], None, *values[5:]], QUICK)
    assert masked.masked == 1 and dataclasses.replace(masked, masked=0) == plain_


def test_the_reversed_series_changes_at_the_same_place():
    forward, back = find_onset(I, stepped(1), QUICK), find_onset(I, stepped(1)[::-1], QUICK)
    assert back.verdict == forward.verdict == SUPPORTED
    assert (23 - back.before, 23 - back.step) == (forward.step, forward.before)
    assert back.changes[0].effect == pytest.approx(-forward.changes[0].effect)


def test_one_seed_one_answer_and_json():
    assert find_onset(I, stepped(), QUICK) == find_onset(I, stepped(), QUICK)
    told = json.loads(json.dumps(plain(find_onset(I, stepped(), QUICK)), allow_nan=False))
    assert told["verdict"] == SUPPORTED and told["changes"][0]["step"] == 10
    by_name = {model["name"]: model for model in told["models"]}
    assert set(by_name) >= {"constant", "logistic", "means with 1 change", "lines with 1 change"}
    n, k, rss = 24, 2, float(((stepped() - stepped().mean()) ** 2).sum())
    constant = by_name["constant"]
    assert constant["rss"] == pytest.approx(rss) and constant["parameters"] == k
    assert constant["bic"] == pytest.approx(n * math.log(rss / n) + k * math.log(n))
    assert constant["aicc"] == pytest.approx(n * math.log(rss / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1))


def test_a_model_with_too_many_parameters_is_not_scored():
    assert all(np.isinf(criteria(np.array([1.0]), 8, 7))) and not any(np.isinf(criteria(np.array([1.0]), 8, 6)))


def test_smooth_fits_are_least_squares():
    rng = np.random.default_rng(0)
    x, rows = np.linspace(0, 1, 24), rng.normal(size=(3, 24)) + 5 * special.expit((I - 12) / 3)
    fits = {fit.name: fit for fit in smooth_fits(x, rows, 0.25)}
    for degree, name in enumerate(("constant", "linear", "quadratic", "cubic")):
        expected = [np.polyval(np.polyfit(x, row, degree), x) for row in rows]
        np.testing.assert_allclose(fits[name].fitted, expected, atol=1e-9)
    for row, fitted in zip(rows, fits["logistic"].fitted, strict=True):
        best = optimize.curve_fit(lambda x, a, b, c, w: a + b * special.expit((x - c) / w), x, row, (0, 5, 0.5, 0.1),
                                  bounds=([-9, -99, 0, 0.25 * 24 / 23 / 4.394], [9, 99, 1, 0.5]))[0]  # fmt: skip
        least = ((row - best[0] - best[1] * special.expit((x - best[2]) / best[3])) ** 2).sum()
        assert ((row - fitted) ** 2).sum() <= 1.01 * least  # what the grid misses


def test_replicates_have_the_noise_of_the_residuals():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=4000)
    for t in range(1, 4000):
        noise[t] += 0.6 * noise[t - 1]
    phi = autocorrelation(noise, 1)
    assert phi == pytest.approx(0.6, abs=4 * math.sqrt((1 - 0.36) / 4000))  # four standard errors
    assert autocorrelation(-noise * (-1.0) ** np.arange(4000), 1) == 0 and autocorrelation(np.zeros(5), 1) == 0
    rows = resampled(np.full(30, 7.0), noise[:30], 0.6, 1, 4000, rng)
    variance = noise[:30] @ noise[:30] / 29
    assert rows.mean() == pytest.approx(7, abs=4 * math.sqrt(variance * 4 / 120000))
    assert rows.var() == pytest.approx(variance, rel=0.05)
    lagged = np.mean((rows[:, 1:] - 7) * (rows[:, :-1] - 7)) / rows.var()
    assert lagged == pytest.approx(0.6, abs=0.02)
    assert (resampled(np.arange(3.0), np.zeros(3), 0.0, 1, 2, rng) == np.arange(3.0)).all()


def test_false_alarms_are_as_rare_as_asked_for():
    settings = dataclasses.replace(QUICK, alpha=0.05)
    alarms = sum(
        find_onset(range(16), np.random.default_rng(seed).normal(size=16), settings).verdict == SUPPORTED
        for seed in range(60)
    )
    assert alarms <= 8  # of 60 at a rate of 5%, more come up three times in a thousand


@pytest.mark.parametrize(
    "bad", [{"alpha": 0}, {"level": 1}, {"effect": -1}, {"most_changes": 0}, {"least": 1}, {"least_rise": 0.0},
            {"bootstrap": 5}, {"alpha": 0.001, "bootstrap": 499}],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match=next(reversed(bad))):
        OnsetSettings(**bad)


def test_log_steps_need_steps_above_minus_one():
    with pytest.raises(ValueError, match="log_steps.*-1"):
        find_onset(I - 1, stepped(), OnsetSettings(log_steps=True))
    assert find_onset(I, stepped(), dataclasses.replace(QUICK, log_steps=True)).step == 10
