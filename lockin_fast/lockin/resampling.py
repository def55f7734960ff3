"""Series that follow a fitted curve with noise like its residuals': what the bootstraps draw."""

import numpy as np

LARGEST = 0.95
"""Beyond this, noise and a random walk cannot be told apart on a few dozen checkpoints."""


def autocorrelation(residuals: np.ndarray, coefficients: int) -> float:
    """Lag-one autocorrelation of n residuals of a fit with that many coefficients, corrected for what fitting removed.

    Residuals of p coefficients have about (p + (p + 2) phi) / n too little (of a mean, (1 + 3 phi) / n); it is undone.
    From 0 to 0.95: negative correlation makes false alarms rarer, and is not counted on.
    """
    power = residuals @ residuals
    if power == 0:
        return 0.0
    n = len(residuals)
    raw = (residuals[1:] @ residuals[:-1]) / power
    return float(np.clip((n * raw + coefficients) / max(n - coefficients - 2, 1), 0.0, LARGEST))


def resampled(
    fitted: np.ndarray, residuals: np.ndarray, phi: float, coefficients: int, count: int, rng: np.random.Generator
) -> np.ndarray:
    """[count, n]: `fitted` plus noise e_t = phi e_{t-1} + u_t, where u are the residuals' own innovations, redrawn.

    u_t = residual_t - phi residual_{t-1}, centred, drawn with replacement and scaled so that the noise has the variance
    RSS / (n - coefficients) that the fit estimates. In steps of checkpoints, however far apart.
    """
    n = len(fitted)
    innovations = residuals[1:] - phi * residuals[:-1]
    innovations -= innovations.mean()
    variance = residuals @ residuals / (n - coefficients)
    spread = np.sqrt(np.mean(innovations**2))
    # Of residuals that are all alike no innovation is left, and there is no noise to draw.
    drawn = rng.choice(innovations / spread if spread > 0 else np.zeros(1), (count, n))
    noise = np.empty((count, n))
    noise[:, 0] = drawn[:, 0]
    for t in range(1, n):
        noise[:, t] = phi * noise[:, t - 1] + np.sqrt(1 - phi**2) * drawn[:, t]
    return fitted + np.sqrt(variance) * noise
