"""Smooth baselines: curves without a change, fitted by least squares to many series of the same length at once."""

from typing import NamedTuple

import numpy as np

POLYNOMIALS = {"constant": 0, "linear": 1, "quadratic": 2, "cubic": 3}
RISE_LOGISTIC = 2 * np.log(9)
"""From 10% to 90% a logistic curve takes 2 ln 9 of its widths, and an exponential ln 9."""
RISE_EXPONENTIAL = np.log(9)
CENTRES = 64
WIDTHS = 10


class Fit(NamedTuple):
    """A model's least-squares fit to every row."""

    name: str
    coefficients: int  # how many numbers it has, without the noise's standard deviation
    fitted: np.ndarray  # [rows, n]


def smooth_fits(x: np.ndarray, rows: np.ndarray, least_rise: float) -> list[Fit]:
    """Polynomials up to the cubic, a logarithm, an exponential approach and a logistic transition, fitted to every row.

        logarithmic   a + b log(1 + x / first gap)               2 numbers
        logistic      a + b / (1 + exp(-(x - c) / w))            4 numbers
        exponential   a + b exp(-x / w),  a + b exp((x - 1) / w)   3 numbers

    x: [n], from 0 to 1. A logistic curve with a small width is a step, so that nothing would ever beat it: its rise
    from 10% to 90%, like the exponential's, takes at least `least_rise` of the checkpoints, by their distance there.
    Runs are measured densely at first, and what then grows evenly from checkpoint to checkpoint is a logarithm.
    Shapes are picked from a grid (64 centres, 10 widths), a and b are exact: O(rows n) per shape.
    """
    fits = [Fit(name, degree + 1, _polynomial(x, rows, degree)) for name, degree in POLYNOMIALS.items()]
    gaps = np.diff(x)
    fits.append(Fit("logarithmic", 2, _best_shape(np.log1p(x / gaps[0])[None], rows)))
    fits.append(Fit("exponential", 3, _best_shape(_exponentials(x, gaps, least_rise), rows)))
    return [*fits, Fit("logistic", 4, _best_shape(_logistics(x, gaps, least_rise), rows))]


def _polynomial(x: np.ndarray, rows: np.ndarray, degree: int) -> np.ndarray:
    basis = np.linalg.qr(np.vander(2 * x - 1, degree + 1))[0]
    return rows @ basis @ basis.T


def _exponentials(x: np.ndarray, gaps: np.ndarray, least_rise: float) -> np.ndarray:
    """[shapes, n]: fast at the start and levelling off, and the mirror image."""
    start, end = (np.geomspace(least_rise * len(x) * gap / RISE_EXPONENTIAL, 2.0, 4 * WIDTHS) for gap in gaps[[0, -1]])
    return np.concatenate([np.exp(-x / start[:, None]), np.exp((x - 1) / end[:, None])])


def _logistics(x: np.ndarray, gaps: np.ndarray, least_rise: float) -> np.ndarray:
    """[shapes, n]: centres at and between the checkpoints, widths from the local minimum to the whole range."""
    middles = np.sort(np.concatenate([x, (x[1:] + x[:-1]) / 2]))
    centres = middles[np.linspace(0, len(middles) - 1, min(CENTRES, len(middles))).round().astype(int)]
    # The gap around a centre; at a checkpoint the wider of its two neighbours'.
    left, right = (np.searchsorted(x, centres, side).clip(1, len(x) - 1) for side in ("left", "right"))
    narrowest = least_rise * len(x) * np.maximum(gaps[left - 1], gaps[right - 1]) / RISE_LOGISTIC
    widths = narrowest * (np.maximum(1.0, 0.5 / narrowest)) ** np.linspace(0, 1, WIDTHS)[:, None]  # [widths, centres]
    scaled = (x - centres[:, None]) / widths[:, :, None]
    return (0.5 + 0.5 * np.tanh(scaled / 2)).reshape(-1, len(x))


def _best_shape(shapes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The fit a + b * shape of the shape that leaves each row the smallest residual."""
    units = shapes - shapes.mean(1, keepdims=True)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    level = rows.mean(1, keepdims=True)
    products = (rows - level) @ units.T  # [rows, shapes]
    best = np.abs(products).argmax(1)
    return level + np.take_along_axis(products, best[:, None], 1) * units[best]
