"""Timing, memory, ceilings and provenance: what every benchmark is measured with."""

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
FLUSHED_BYTES = 2**28  # more than any cache a GPU has


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs: median, and the quartiles as the spread."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, seconds):
        if len(seconds) < 2:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, len(seconds))


def interleaved(steps, rounds, warmup=3, device="cpu"):
    """Time `steps` (name -> callable) in turn, `rounds` times, each round starting one further along.

    Whatever disturbs the machine for a while then disturbs everyone, and nobody always runs after the same neighbour.
    On a GPU the time is that between two events on the stream, with the caches flushed before.
    """
    clock = _GpuClock() if device == "cuda" else _host_seconds
    names = list(steps)
    seconds = {name: [] for name in names}
    for r in range(-warmup, rounds):
        shift = r % len(names)
        for name in names[shift:] + names[:shift]:
            taken = clock(steps[name])
            if r >= 0:
                seconds[name].append(taken)
    return {name: Timing.of(values) for name, values in seconds.items()}


def _host_seconds(step):
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


class _GpuClock:
    def __init__(self):
        self.flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, step):
        self.flushed.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def peak_memory(call, device="cpu"):
    """Bytes by which memory rose above its level before `call`, the result included (resident memory; Linux only)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
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


def copy_step(size, device="cpu"):
    """(a copy of `size` bytes, at most 256 MB, bytes it moves): its rate is the ceiling of what is bound by memory."""
    length = max(min(size, 2**28), 2**12)
    source = torch.zeros(length, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source), 2 * length


def product_rate(dtype, device="cpu"):
    """FLOP/s of a large matrix product of stock torch in `dtype`, the best of a few: the ceiling of what multiplies."""
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty(side, side, dtype=dtype, device=device)
    timing = interleaved({"product": lambda: torch.mm(a, b.t(), out=out)}, 5, 2, device)["product"]
    return 2 * side**3 / timing.low


def provenance():
    """Date, machine, versions and commit, as they go into every row of the results."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "threads": torch.get_num_threads(),
        "isa": _isa(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
    }


def describe(facts):
    return "\n".join(f"  {key:<8}{value}" for key, value in facts.items() if value != "")


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

    # What a benchmark itself writes does not make the code another one.
    changed = git("status", "--porcelain", "--", ":/", ":!/benchmarks/results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+changes" if changed else "")


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
