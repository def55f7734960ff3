"""When a series changes: segmented models against smooth ones, the size of the change, an interval for its place."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from lockin_fast.lockin.changepoints import PARAMETERS, best_segmentations, segment_costs, segment_fit
from lockin_fast.lockin.model_choice import NOISELESS, Candidate, pieces, segmented_candidates, smooth_candidates
from lockin_fast.lockin.resampling import autocorrelation, resampled
from lockin_fast.lockin.series import Values, measured
from lockin_fast.lockin.verdict import CANNOT_SAY, NOT_SUPPORTED, SUPPORTED
from lockin_fast.measure_settings import OnsetSettings

CONSTANT = 1e-12
"""A series whose range is less than this share of its largest value differs by rounding alone."""


@dataclasses.dataclass(frozen=True)
class Change:
    """One change of the best segmented model."""

    step: float  # the first checkpoint after it
    before: float  # the last checkpoint before it
    shift: float  # mean of the segment that follows minus mean of the segment that ends, in units of the values
    effect: float  # shift in standard deviations of the residuals


@dataclasses.dataclass(frozen=True)
class Model:
    """One of the models compared; `parameters` counts coefficients, positions of changes and the noise's variance."""

    name: str
    parameters: int
    rss: float
    aicc: float
    bic: float
    changes: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Onset:
    """Whether and when a series changed, and what was compared; without support there is no step and no interval.

    interval: the change lies after its first and not after its second step, at the level of the settings. aic_gain,
    bic_gain: by how much the best smooth model's criterion exceeds the best segmented one's; positive favours a
    change. p: share of the replicates of the best smooth model that favour a change at least as much.
    autocorrelation: of the best smooth model's residuals, lag one.
    """

    verdict: str
    why: str
    checkpoints: int
    masked: int
    step: float | None = None
    before: float | None = None
    interval: tuple[float, float] | None = None
    changes: tuple[Change, ...] = ()
    best: str | None = None
    baseline: str | None = None
    aic_gain: float | None = None
    bic_gain: float | None = None
    p: float | None = None
    autocorrelation: float | None = None
    residual_sd: float | None = None
    models: tuple[Model, ...] = ()


def least_checkpoints(settings: OnsetSettings) -> int:
    """The fewest checkpoints about which anything is said: two segments, and the smallest for which AICc exists."""
    return max(2 * settings.least, 8)


def find_onset(steps: Sequence[float], values: Values, settings: OnsetSettings | None = None) -> Onset:
    """Whether a series has a change that no smooth curve explains, where, how large, and how sure its place is.

        smooth      polynomials to the cubic, logarithm, exponential approach, logistic transition (`smooth_fits`)
        segmented   levels (`mean`) or straight lines (`line`) between 1 .. most_changes changes, fitted exactly
        AICc        n ln(RSS / n) + 2 k + 2 k (k + 1) / (n - k - 1)
        BIC         n ln(RSS / n) + k ln n

    Supported where the best segmented model (by BIC) beats every smooth one by AICc and by BIC, at least one of its
    changes has the effect asked for, and p <= alpha. The first such change is the onset.

    The criteria alone would not do: a change may lie anywhere, so that they prefer one in every few series of white
    noise. p compares the gain in BIC with that of replicates of the best smooth model, put through the same search,
    whose noise is resampled with the autocorrelation of the residuals. The interval refits the chosen segmented model
    to replicates of itself: percentiles of the change's index, from the checkpoint before it on.

    steps: n numbers that ascend; values: as many, None or NaN masked and counted. Deterministic for one seed. Shifting
    or scaling values changes nothing but their units; nor does shifting or scaling steps without log_steps.
    Cost: O(bootstrap n^2 most_changes): 0.1 s for 30 checkpoints, about 1 s for 150.
    Raises ValueError for what `series.measured` refuses and for steps of -1 or less with log_steps.
    Source: criteria and comparison, arXiv 2510.20190; models, counts, effect, p and interval, this project.
    """
    settings = settings or OnsetSettings()
    at, rows, masked = measured(steps, values=values)
    if settings.log_steps and (at <= -1).any():
        raise ValueError(f"log_steps: needs steps above -1, got {at[0]:g}")
    y, n = rows[0], len(at)
    if n < least_checkpoints(settings):
        why = f"{n} checkpoints were measured ({masked} masked); at least {least_checkpoints(settings)} are needed"
        return Onset(CANNOT_SAY, why, n, masked)
    if np.ptp(y) <= CONSTANT * np.abs(y).max():
        return Onset(NOT_SUPPORTED, "the series is constant", n, masked)
    scale = np.ptp(y)
    position = np.log1p(at) if settings.log_steps else at
    x = (position - position[0]) / np.ptp(position)
    return _judged(at, x, (y - y.mean()) / scale, scale, masked, settings)


def _judged(at, x, y, scale, masked, settings) -> Onset:
    """The verdict on a series `y` of range 1 and mean 0; `scale` is one unit of it in the user's."""
    n, rng = len(at), np.random.default_rng(settings.seed)
    smooth, segmented = _models(x, y[None], settings)
    baseline, best = min(smooth, key=_bic), min(segmented, key=_bic)
    aic_gain = min(one.aicc[0] for one in smooth) - best.aicc[0]
    bic_gain = baseline.bic[0] - best.bic[0]

    noise = y - baseline.fitted[0]
    phi = autocorrelation(noise, baseline.coefficients)
    replicates = resampled(baseline.fitted[0], noise, phi, baseline.coefficients, settings.bootstrap, rng)
    p = (1 + int((_bic_gains(x, replicates, settings) >= bic_gain).sum())) / (1 + settings.bootstrap)

    sd = float(np.sqrt(best.rss[0] / (n - best.coefficients)))
    changes = _changes(at, y, best.changes[0], sd, scale)
    large = [i for i, change in enumerate(changes) if abs(change.effect) >= settings.effect]
    conditions = (
        (aic_gain > 0, f"AICc does not prefer it to every smooth model (gain {aic_gain:.2f})"),
        (bic_gain > 0, f"BIC does not prefer it to the {baseline.name} model (gain {bic_gain:.2f})"),
        (large, f"no shift reaches {settings.effect:g} residual standard deviations"),
        (p <= settings.alpha, f"{baseline.name} series with such noise look as changed with probability {p:.3f}"),
    )
    comparison = {
        "changes": changes,
        "best": best.name,
        "baseline": baseline.name,
        "aic_gain": float(aic_gain),
        "bic_gain": float(bic_gain),
        "p": p,
        "autocorrelation": phi,
        "residual_sd": sd * float(scale),
        "models": tuple(_model(one, at, scale) for one in (*smooth, *segmented) if np.isfinite(one.bic[0])),
    }
    if failed := [reason for holds, reason in conditions if not holds]:
        return Onset(NOT_SUPPORTED, f"{best.name}: {'; '.join(failed)}", n, masked, **comparison)
    onset = changes[large[0]]
    comparison |= {"step": onset.step, "before": onset.before}
    comparison["interval"] = _interval(at, x, y, best, large[0], settings, rng)
    why = f"{best.name} beats {baseline.name} (AICc, BIC, p {p:.3f}): a shift of {onset.effect:.2f} residual sd"
    return Onset(SUPPORTED, why, n, masked, **comparison)


def _models(x, rows, settings) -> tuple[list[Candidate], list[Candidate]]:
    return (
        smooth_candidates(x, rows, settings.least_rise),
        segmented_candidates(x, rows, settings.least, settings.most_changes),
    )


def _bic(one: Candidate) -> float:
    return one.bic[0]


def _bic_gains(x, rows, settings) -> np.ndarray:
    """[rows]: the gain in BIC of the best segmented model over the best smooth one."""
    gains = []
    for piece in pieces(rows):
        smooth, segmented = (np.min([one.bic for one in models], 0) for models in _models(x, piece, settings))
        gains.append(smooth - segmented)
    return np.concatenate(gains)


def _changes(at, y, starts, sd, scale) -> tuple[Change, ...]:
    edges = [0, *starts, len(y)]
    shifts = np.diff([y[s:t].mean() for s, t in itertools.pairwise(edges)])
    # A fit without residuals would divide by zero: what counts as none stands in for them.
    effects = shifts / max(sd, np.sqrt(NOISELESS))
    return tuple(
        Change(float(at[i]), float(at[i - 1]), float(shift * scale), float(effect))
        for i, shift, effect in zip(starts, shifts, effects, strict=True)
    )


def _model(one: Candidate, at, scale) -> Model:
    unit = 2 * len(at) * np.log(scale)  # the criteria of values in the user's units
    changes = () if one.changes is None else tuple(float(at[i]) for i in one.changes[0])
    rss, aicc, bic = float(one.rss[0] * scale**2), float(one.aicc[0] + unit), float(one.bic[0] + unit)
    return Model(one.name, one.parameters, rss, aicc, bic, changes)


def _interval(at, x, y, best, which, settings, rng) -> tuple[float, float]:
    fitted = segment_fit(x, y, best.kind, best.changes[0])
    phi = autocorrelation(y - fitted, best.coefficients)
    rows = resampled(fitted, y - fitted, phi, best.coefficients, settings.bootstrap, rng)
    count, shortest = best.changes.shape[1], max(settings.least, PARAMETERS[best.kind] + 1)
    index = [
        best_segmentations(segment_costs(x, piece, best.kind, shortest), count)[count].changes[:, which]
        for piece in pieces(rows)
    ]
    tail, found = (1 - settings.level) / 2, best.changes[0, which]
    low = np.quantile(np.concatenate(index), tail, method="lower")
    high = np.quantile(np.concatenate(index), 1 - tail, method="higher")
    return float(at[min(low, found) - 1]), float(at[max(high, found)])
