"""A metric over checkpoints: masking of failed evaluations, moving averages, rank correlation, published summaries."""

import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

Values = Sequence[float | None]
"""One value per checkpoint; None or NaN is an evaluation that failed, which is masked and counted."""
Alternative = Literal["two-sided", "greater", "less"]
EXACT_UP_TO = 9
"""Rank correlations of at most so many points are tested against all orderings (9! = 362,880, half a second)."""
TAILS = {"two-sided": np.abs, "greater": np.positive, "less": np.negative}


class Measured(NamedTuple):
    """The checkpoints at which every one of some series was measured, and how many were masked."""

    steps: np.ndarray  # [n] float64, ascending
    values: np.ndarray  # [series, n] float64
    masked: int


class Correlation(NamedTuple):
    """Spearman's rho and its p value, None where a side is constant or fewer than three points are left."""

    rho: float | None
    p: float | None
    n: int
    masked: int
    method: str


class Summary(NamedTuple):
    """One row of the lock-in paper's first table."""

    checkpoints: int
    masked: int
    mean: float | None
    delta: float | None
    rho: float | None
    p: float | None


def measured(steps: Sequence[float], **series: Values) -> Measured:
    """The checkpoints where all the named `series` have a value; None and NaN count as failed evaluations.

    Raises ValueError where a series has another length than `steps`, where steps do not ascend or are not finite, and
    for an infinite value, which is neither a measurement nor a failure.
    """
    at = np.array(steps, dtype=np.float64)
    if at.ndim != 1 or not np.isfinite(at).all() or (np.diff(at) <= 0).any():
        raise ValueError(f"steps: expected finite numbers that ascend, each checkpoint once, got {list(steps)}")
    rows = np.empty((len(series), len(at)))
    for row, (name, values) in zip(rows, series.items(), strict=True):
        if len(values) != len(at):
            raise ValueError(f"{name}: {len(values)} values for {len(at)} steps; give None where an evaluation failed")
        row[:] = [math.nan if value is None else value for value in values]
        if np.isinf(row).any():
            raise ValueError(f"{name}: infinite at step {at[np.isinf(row)][0]:g}; give None for a failed evaluation")
    kept = ~np.isnan(rows).any(0)
    return Measured(at[kept], rows[:, kept], int((~kept).sum()))


def mask_failed(values: Values, accuracy: Values, *, floor: float = 0.01) -> list[float | None]:
    """`values`, with None where the task accuracy of that checkpoint is below `floor` or missing.

    An accuracy below 1% is a broken evaluation (a template or a parser), not a model that knows nothing: guessing
    among four answers gives 25%. Source: arXiv 2510.20190. Raises ValueError for unequal lengths.
    """
    if len(values) != len(accuracy):
        raise ValueError(f"accuracy: {len(accuracy)} values for {len(values)}; one per checkpoint is needed")
    return [
        value if value is not None and right is not None and right >= floor else None
        for value, right in zip(values, accuracy, strict=True)
    ]


def moving_average(values: Values, window: int) -> list[float | None]:
    """The mean over the `window` checkpoints (odd) around each one, cut off at the ends and without masked values.

    A masked checkpoint stays masked. Raises ValueError for a window that is not odd and positive.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window: expected an odd number of checkpoints from 1 on, got {window}")
    clean = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
    half = window // 2
    return [
        None if math.isnan(value) else float(np.nanmean(clean[max(i - half, 0) : i + half + 1]))
        for i, value in enumerate(clean)
    ]


def spearman(x: Values, y: Values, *, alternative: Alternative = "two-sided") -> Correlation:
    """Spearman's rho, the correlation of ranks (ties share their mean rank), over pairs where neither side is masked.

    The p value is the share of all orderings with a rho at least as extreme, up to `EXACT_UP_TO` points, and scipy's
    t approximation beyond. Both take the points to be exchangeable. Checkpoints of one run are not: two series that
    only drift correlate strongly, so a small p says that they move together, not why.
    Raises ValueError for unequal lengths, an infinite value or an unknown alternative.
    """
    from scipy import stats

    if alternative not in TAILS:
        raise ValueError(f"alternative: expected one of {', '.join(TAILS)}, got {alternative!r}")
    pairs = measured(range(len(x)), x=x, y=y)
    n = len(pairs.steps)
    if n < 3 or (np.ptp(pairs.values, axis=1) == 0).any():
        return Correlation(None, None, n, pairs.masked, "undefined")
    if n > EXACT_UP_TO:
        found = stats.spearmanr(*pairs.values, alternative=alternative)
        return Correlation(float(found.statistic), float(found.pvalue), n, pairs.masked, "t approximation")
    # Twice the ranks, centred, times n, are whole numbers, so that ties between orderings are exact.
    a, b = (2 * n * stats.rankdata(row) - n * (n + 1) for row in pairs.values)
    orderings = np.array(list(itertools.permutations(range(n))))
    tail = TAILS[alternative]
    p = np.mean(tail(b[orderings] @ a) >= tail(a @ b))
    rho = a @ b / math.sqrt((a @ a) * (b @ b))
    return Correlation(float(rho), float(p), n, pairs.masked, "exact")


def summarise(steps: Sequence[float], values: Values) -> Summary:
    """Count, mean, last minus first, and Spearman's rho with the step, over what was measured.

    Source: the shape of table 1 of arXiv 2510.20190. Its "step 0" was the final adapter, so its deltas mislead.
    """
    found = measured(steps, values=values)
    if not len(found.steps):
        return Summary(0, found.masked, None, None, None, None)
    row = found.values[0]
    trend = spearman(found.steps, row)
    return Summary(len(row), found.masked, float(row.mean()), float(row[-1] - row[0]), trend.rho, trend.p)
