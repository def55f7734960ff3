"""python -m benchmarks.gpu_defaults: which backend serves an op on a GPU, from what was measured on one.

Reads results/gpu_benchmarks.csv and gpu_tests.csv and writes lockin_fast/kernels/gpu_defaults.json, which dispatch
reads: op -> {"backend", "measured"}. An op is there when more than one backend was measured on it and passed its tests;
the one with the smaller geometric mean of medians over the cases both ran wins.
"""

import csv
import json
import math
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
MEASURED = "gpu_benchmarks.csv"
DEFAULTS = Path(__file__).parents[1] / "lockin_fast" / "kernels" / "gpu_defaults.json"


def rows(file):
    return list(csv.DictReader(file.open())) if file.exists() else []


def compute(results=RESULTS):
    """op -> {"backend", "measured"}."""
    failed = {(row["op"], row["backend"]) for row in rows(results / "gpu_tests.csv") if row["tests"] != "passed"}
    medians = {}  # op -> backend -> case -> ms
    for row in rows(results / MEASURED):
        if row["ours"] != "1":
            continue
        for op in row["op"].split():
            if (op, row["backend"]) not in failed:
                cases = medians.setdefault(op, {}).setdefault(row["backend"], {})
                cases[row["case"], row["provider"], row["shape"]] = float(row["median_ms"])
    chosen = {}
    for op, backends in sorted(medians.items()):
        shared = set.intersection(*map(set, backends.values()))
        if len(backends) > 1 and shared:
            best = min(backends, key=lambda name: sum(math.log(backends[name][case]) for case in shared))
            chosen[op] = {"backend": best, "measured": MEASURED}
    return chosen


def write():
    DEFAULTS.write_text(json.dumps(compute(), indent=2, sort_keys=True) + "\n")
    return DEFAULTS


if __name__ == "__main__":
    print(write())
