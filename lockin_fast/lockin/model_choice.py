"""Smooth and segmented models of a series, with what AICc and BIC say of each, for many series at once."""

from typing import NamedTuple

import numpy as np

from lockin_fast.lockin.changepoints import PARAMETERS, Kind, best_segmentations, segment_costs
from lockin_fast.lockin.curves import smooth_fits

NOISELESS = 1e-12
"""Variance, as a share of the squared range, below which a fit is exact: the sums behind it are no more precise."""


class Candidate(NamedTuple):
    """One model of every row. A smooth one has its `fitted` curves, a segmented one its `kind` and `changes`."""

    name: str
    coefficients: int
    parameters: int  # coefficients, positions of changes, and the noise's variance
    rss: np.ndarray  # [rows]
    aicc: np.ndarray  # [rows]
    bic: np.ndarray  # [rows]
    fitted: np.ndarray | None = None  # [rows, n]
    kind: Kind | None = None
    changes: np.ndarray | None = None  # [rows, changes]


def smooth_candidates(x: np.ndarray, rows: np.ndarray, least_rise: float) -> list[Candidate]:
    """The smooth models of `rows` [rows, n], of range 1, over x [n], from 0 to 1."""
    found = []
    for name, coefficients, fitted in smooth_fits(x, rows, least_rise):
        rss = ((rows - fitted) ** 2).sum(1)
        scored = criteria(rss, len(x), coefficients + 1)
        found.append(Candidate(name, coefficients, coefficients + 1, rss, *scored, fitted=fitted))
    return found


def segmented_candidates(x: np.ndarray, rows: np.ndarray, least: int, most_changes: int) -> list[Candidate]:
    """The segmented models that n points suffice for; the position of a change counts as one parameter."""
    found, n = [], len(x)
    for kind, each in PARAMETERS.items():
        shortest = max(least, each + 1)
        costs, most = segment_costs(x, rows, kind, shortest), min(most_changes, n // shortest - 1)
        for count, (rss, changes) in enumerate(best_segmentations(costs, most)[1:], 1):
            coefficients = each * (count + 1)
            parameters = coefficients + count + 1
            scored = criteria(rss, n, parameters)
            name = f"{kind}s with {count} change{'s' if count > 1 else ''}"
            found.append(Candidate(name, coefficients, parameters, rss, *scored, kind=kind, changes=changes))
    return found


def criteria(rss: np.ndarray, n: int, parameters: int) -> tuple[np.ndarray, np.ndarray]:
    """AICc and BIC of Gaussian fits, without the constants that all models share; inf where AICc does not exist.

    AICc = n ln(RSS / n) + 2 k + 2 k (k + 1) / (n - k - 1) (Hurvich and Tsai 1989), BIC = n ln(RSS / n) + k ln n.
    """
    freedom = n - parameters - 1
    if freedom <= 0:
        nothing = np.full_like(rss, np.inf)
        return nothing, nothing
    misfit = n * np.log(np.maximum(rss / n, NOISELESS))
    return (
        misfit + 2 * parameters + 2 * parameters * (parameters + 1) / freedom,
        misfit + parameters * np.log(n),
    )


def pieces(rows: np.ndarray) -> list[np.ndarray]:
    """`rows` in pieces whose tables of segments take about 16 MB each."""
    each = max(1, 2_000_000 // (rows.shape[1] + 1) ** 2)
    return [rows[start : start + each] for start in range(0, len(rows), each)]
