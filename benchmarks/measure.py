"""What every benchmark shares: provenance, interleaved timing, peak memory, and CSV results."""

import csv
import datetime
import platform
import statistics
import subprocess
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs: median, and the quartiles as the spread."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, seconds):
        low, median, high = statistics.quantiles(seconds, n=4)
        return cls(median, low, high, len(seconds))


def interleaved(steps, rounds, warmup=3):
    """Time `steps` (name -> callable) in turn, `rounds` times, each round starting one further along.

    Whatever disturbs the machine for a while then disturbs everyone, and nobody always runs after the same neighbour.
    """
    names = list(steps)
    seconds = {name: [] for name in names}
    for r in range(-warmup, rounds):
        shift = r % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            steps[name]()
            if r >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing.of(values) for name, values in seconds.items()}


def peak_memory(call):
    """Bytes by which resident memory rose above its level before `call`, the result included. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM") - before
    del result
    return peak


def _status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def provenance():
    """Date, machine, versions and commit, as they go into every row of the results."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "isa": _isa(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
    }


def describe(facts):
    return "\n".join(f"  {key:<8}{value}" for key, value in facts.items())


def _cpu_model():
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _isa():
    if find_spec("lockin_fast._native") is None:
        return "nothing compiled"
    from lockin_fast import _native

    return _native.isa()


def _commit():
    def git(*args):
        return subprocess.run(["git", *args], capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+changes" if git("status", "--porcelain") else "")


def write_csv(name, rows):
    """Write `rows` (dicts with the same keys) to benchmarks/results/<name>.csv, provenance in every row."""
    facts = provenance()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts])
        writer.writeheader()
        writer.writerows({**row, **facts} for row in rows)
    return path
