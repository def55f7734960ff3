"""Intervals of shares and of means over prompts: how far a figure could be off by the luck of the draw."""

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np

Interval = tuple[float, float]


def wilson(share: float, count: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share of `count` independent replies, within [0, 1].

        centre +- half, with q = normal quantile, centre = (share + q^2 / 2n) / (1 + q^2 / n),
        half = q / (1 + q^2 / n) * sqrt(share (1 - share) / n + q^2 / 4n^2)

    Of shares that several judges split it is too wide: no variable in [0, 1] varies more than a yes or no does.
    Raises ValueError for a share or a level out of range, and a count below 1.
    """
    check_level(level)
    if not 0 <= share <= 1 or count < 1:
        raise ValueError(f"share: expected 0 to 1 of at least 1 reply, got {share} of {count}")
    q2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    scale = 1 + q2 / count
    centre = (share + q2 / (2 * count)) / scale
    half = math.sqrt(q2 * (share * (1 - share) / count + q2 / (4 * count**2))) / scale
    return max(centre - half, 0.0), min(centre + half, 1.0)


def bootstrap(
    values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], *, level: float, resamples: int, seed: int
) -> Interval:
    """Percentile interval of `statistic` over `resamples` draws of n values [n] with replacement, under `seed`.

    statistic: [resamples, n] to [resamples]. Takes the values to be independent draws; of few (below about 10) the
    interval is too narrow. Costs resamples * n numbers of memory. Raises ValueError for a level out of range.
    """
    check_level(level)
    if resamples < 1:
        raise ValueError(f"resamples: expected 1 or more, got {resamples}")
    drawn = np.random.default_rng(seed).choice(values, (resamples, len(values)))
    low, high = np.quantile(statistic(drawn), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def check_level(level: float) -> None:
    """Raise ValueError unless `level` lies between 0 and 1."""
    if not 0 < level < 1:
        raise ValueError(f"level: expected a coverage between 0 and 1, got {level}")
