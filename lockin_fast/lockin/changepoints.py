"""Where a series changes: exact segmentations by dynamic programming, of many series of the same length at once.

Series of checkpoints are short (tens to hundreds) and unevenly spaced, so the costs of all segments fit in a table,
the best segmentation is found exactly, and a bootstrap's replicates share each step. For one evenly spaced series of
thousands, use ruptures' KernelCPD; it gives the same changes.
"""

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from lockin_fast.lockin.series import Values, measured

Kind = Literal["mean", "line"]
PARAMETERS = {"mean": 1, "line": 2}
"""Coefficients of one segment: a level, or a level and a slope."""


class Segmentation(NamedTuple):
    """The best split of each of `rows` series at so many changes."""

    rss: np.ndarray  # [rows] residual sum of squares, inf where no split fits
    changes: np.ndarray  # [rows, changes] index of the first point of each later segment, ascending


def segment_costs(x: np.ndarray, rows: np.ndarray, kind: Kind, least: int) -> np.ndarray:
    """Residual sum of squares of every segment of every row: [rows, n + 1, n + 1], entry [., s, t] for points s..t-1.

    x: [n] ascending; rows: [rows, n]. `mean` fits a level to a segment, `line` a straight line in x. Segments shorter
    than `least` cost inf. About 10 n^2 rows flops and 8 n^2 rows bytes.
    """
    n = len(x)
    costs = np.full((len(rows), n + 1, n + 1), np.inf)
    for s in range(n - least + 1):
        # Counted from the segment's own first point: the sums then hold small numbers, and cancel little.
        dx, dy, count = x[s:] - x[s], rows[:, s:] - rows[:, s, None], np.arange(1, n - s + 1)
        sum_x, sum_y = dx.cumsum(), dy.cumsum(1)
        rss = (dy**2).cumsum(1) - sum_y**2 / count
        if kind == "line":
            spread = (dx**2).cumsum() - sum_x**2 / count
            spread[0] = np.inf  # one point has no slope
            rss -= ((dx * dy).cumsum(1) - sum_x * sum_y / count) ** 2 / spread
        costs[:, s, s + least :] = np.maximum(rss[:, least - 1 :], 0.0)
    return costs


def best_segmentations(costs: np.ndarray, most: int) -> list[Segmentation]:
    """The least-squares segmentation with 0, 1 ... `most` changes of every row of a table of `segment_costs`.

    Exact: best(m, t) = min over s of best(m - 1, s) + cost(s, t). O(most n^2) a row.
    """
    every, n = np.arange(len(costs)), costs.shape[1] - 1
    best, starts, found = costs[:, 0, :], [], [Segmentation(costs[:, 0, n], np.empty((len(costs), 0), dtype=int))]
    for count in range(1, most + 1):
        if count > 1:  # the best of each beginning of the series, which the first change does not need
            table = best[:, :, None] + costs
            starts.append(table.argmin(1))
            best = np.take_along_axis(table, starts[-1][:, None], 1)[:, 0]
        whole = best + costs[:, :, n]
        changes = [whole.argmin(1)]
        for start in reversed(starts):
            changes.append(start[every, changes[-1]])
        found.append(Segmentation(whole[every, changes[0]], np.stack(changes[::-1], 1)))
    return found


def segment_fit(x: np.ndarray, y: np.ndarray, kind: Kind, starts: Sequence[int]) -> np.ndarray:
    """[n]: the level or line of each segment, where `starts` are the first points of the later segments."""
    fitted = np.empty_like(y)
    for s, t in itertools.pairwise([0, *starts, len(y)]):
        centred, level = x[s:t] - x[s:t].mean(), y[s:t].mean()
        slope = centred @ y[s:t] / (centred @ centred) if kind == "line" else 0.0
        fitted[s:t] = level + slope * centred
    return fitted


def changepoints(
    steps: Sequence[float], values: Values, *, penalty: float, kind: Kind = "mean", least: int = 2
) -> list[float]:
    """The steps at which the segmentation of least penalised cost starts a segment; masked checkpoints are left out.

        cost = sum over segments of the residual sum of squares + penalty * number of changes

    This is the optimum that PELT finds (ruptures: Pelt(model="l2", jump=1, min_size=least) for `mean`), by optimal
    partitioning, O(n^2). With noise of variance v, 2 v is Akaike's penalty for a change of mean without its position
    and v ln n is BIC's; two to three times BIC's is usual.
    Raises ValueError for a negative penalty, an unknown kind, `least` below 1 (line: 2) or a series that
    `measured` refuses.
    """
    if not penalty >= 0:
        raise ValueError(f"penalty: expected a number of at least 0, in squared units of the values, got {penalty}")
    if kind not in PARAMETERS:
        raise ValueError(f"kind: expected one of {', '.join(PARAMETERS)}, got {kind!r}")
    if least < PARAMETERS[kind]:
        raise ValueError(f"least: a segment of kind {kind} needs at least {PARAMETERS[kind]} checkpoints, got {least}")
    at, rows, _ = measured(steps, values=values)
    costs = segment_costs(at, rows, kind, least)[0] + penalty
    best, starts = np.zeros(len(at) + 1), np.zeros(len(at) + 1, dtype=int)
    for t in range(1, len(at) + 1):
        totals = best[:t] + costs[:t, t]
        starts[t] = totals.argmin()
        best[t] = totals[starts[t]]
    found, end = [], starts[-1]
    while end > 0:
        found.append(float(at[end]))
        end = starts[end]
    return found[::-1]
