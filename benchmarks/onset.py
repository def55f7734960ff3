"""How often an onset is found where there is one, and where there is none: `find_onset` on series made to order.

    python -m benchmarks.onset [--series 400] [--workers 2]     # ten minutes on two cores; needs no quiet machine

Every row of benchmarks/results/onset.csv is one kind of series: `series` of them are drawn, of so many checkpoints,
with noise of standard deviation 1 (white, or autoregressive with coefficient `phi`), and put through `find_onset` as
users call it. `rate` is the share called supported: false alarms where the truth is smooth, power where it has a
change. `criteria_alone` is the share that AICc and BIC prefer, whatever effect and p. `near` is the share of the onsets
found that are within one checkpoint, `covered` that of the intervals that hold the true change. Seeded.
"""

import argparse
import functools
import multiprocessing

import numpy as np

from benchmarks.measure import write_csv
from lockin_fast.lockin.onset import OnsetSettings, find_onset
from lockin_fast.lockin.verdict import SUPPORTED


def truths(n):
    """name -> (the series without noise per unit of size, whether it has a change)."""
    i = np.arange(n)
    change = i >= n // 2
    return {
        "step": (1.0 * change, True),
        "step on a drift": (change + 0.5 * i / n, True),
        "logistic over 1 gap": (_logistic(i, n, 1), True),
        "logistic over 2 gaps": (_logistic(i, n, 2), True),
        "constant": (0.0 * i, False),
        "linear drift": (i / n, False),
        "half a sine": (np.sin(np.pi * i / n), False),
        "exponential approach": (1 - np.exp(-5 * i / n), False),
        "logistic over a third": (_logistic(i, n, n / 3), False),
        "logistic over two thirds": (_logistic(i, n, 2 * n / 3), False),
    }


def _logistic(i, n, rise):
    return 1 / (1 + np.exp(-(i - n // 2 + 0.5) * 2 * np.log(9) / rise))


def conditions():
    """(truth, checkpoints, size of its rise in standard deviations of the noise, phi)."""
    for n in (18, 40):
        for phi in (0.0, 0.5, 0.8):
            yield "constant", n, 0, phi
            for smooth in (
                name for name, (_, has_change) in truths(n).items() if not has_change and name != "constant"
            ):
                for size in (5, 20) if phi == 0 else (5,):
                    yield smooth, n, size, phi
            if phi < 0.8:
                for size in (1, 2, 3, 5, 10):
                    yield "step", n, size, phi
        for changed in ("step on a drift", "logistic over 1 gap", "logistic over 2 gaps"):
            for size in (3, 5, 10):
                yield changed, n, size, 0.0


def measure(condition, series):
    """The row of one condition."""
    name, n, size, phi = condition
    curve, has_change = truths(n)[name]
    found, alone = [], 0
    for seed in range(series):
        onset = find_onset(range(n), size * curve + _noise(n, phi, np.random.default_rng(seed)), OnsetSettings())
        alone += onset.aic_gain > 0 and onset.bic_gain > 0
        if onset.verdict == SUPPORTED:
            found.append(onset)
    row = {"truth": name, "change": int(has_change), "checkpoints": n, "size": size, "phi": phi, "series": series}
    row |= {"rate": len(found) / series, "criteria_alone": alone / series, "near": "", "covered": ""}
    if has_change and found:
        row["near"] = round(float(np.mean([abs(onset.step - n // 2) <= 1 for onset in found])), 4)
        # The change lies between the checkpoints n // 2 - 1 and n // 2.
        row["covered"] = round(float(np.mean([o.interval[0] < n // 2 <= o.interval[1] for o in found])), 4)
    return row


def _noise(n, phi, rng):
    noise = rng.normal(size=n)
    for t in range(1, n):
        noise[t] = phi * noise[t - 1] + np.sqrt(1 - phi**2) * noise[t]
    return noise


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=int, default=400, help="series per condition")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    rows = []
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for row in pool.imap(functools.partial(measure, series=options.series), list(conditions())):
            print(*(f"{key} {value}" for key, value in row.items()), sep=", ", flush=True)
            rows.append(row)
    write_csv("onset", rows)


if __name__ == "__main__":
    main()
