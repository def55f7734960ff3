"""python -m benchmarks.run [name ...] [--case TEXT] [--rounds N] [--device cuda]: some benchmarks, or all of them.

Every case runs in processes of its own, on a CPU once with the C library's default allocator and once with one that
retains memory, as large fresh tensors are paid in page faults. Providers are interleaved. Printed and written to
results/<name>.csv are median and quartiles, memory beyond what was there, and the fraction of the ceiling, that is of
the larger of the times which a plain copy of the bytes and a plain product of the FLOPs would take in the same run.
"""

import argparse
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.measure import copy_step, describe, interleaved, peak_memory, product_rate, provenance, write_csv

ALLOCATORS = {
    "default": {},
    "retained": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 34), "MALLOC_TOP_PAD_": str(1 << 28)},
}
CEILING = "copy ceiling"


def names():
    """The benchmark files that offer cases."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if "\ndef cases(" in p.read_text())


def cases_of(name):
    return list(import_module(f"benchmarks.{name}").cases())


def measure(case, rounds, device, with_memory):
    """The rows of one case in this process, without provenance."""
    torch.set_default_device(device)
    work = case.work()
    steps = dict(work.providers)
    steps[CEILING], copied = copy_step(max(work.bytes // 2, 1), device)
    timings = interleaved(steps, rounds or case.rounds, 3 if case.rounds > 5 else 1, device)
    copy_rate = copied / timings.pop(CEILING).median
    flop_rate = product_rate(case.shape.get("dtype", torch.float32), device) if work.flops else 0.0
    least = max(work.bytes / copy_rate, work.flops / flop_rate if flop_rate else 0.0)
    without = timings.pop(work.without).median if work.without else 0.0
    floor = timings[work.bare].median if work.bare else 0.0
    best = min(t.median for name, t in timings.items() if name not in work.ours and name != work.bare) - without
    rows = []
    for name, timing in timings.items():
        seconds = timing.median - without
        row = {
            "provider": name,
            "ours": int(name in work.ours),
            "median_ms": 1e3 * seconds,
            "low_ms": 1e3 * (timing.low - without),
            "high_ms": 1e3 * (timing.high - without),
            "rounds": timing.runs,
            "extra_mb": peak_memory(work.providers[name], device) / 1e6 if with_memory else "",
            "gb_per_s": work.bytes / seconds / 1e9,
            "gflop_per_s": work.flops / seconds / 1e9,
            "copy_gb_per_s": copy_rate / 1e9,
            "product_gflop_per_s": flop_rate / 1e9,
            "of_ceiling": least / seconds,
            "best_baseline_over_this": best / seconds,
            "this_over_bare": seconds / floor if floor else "",
        }
        rows.append({key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()})
    return rows


def in_subprocess(name, index, allocator, options):
    """The rows of one case, measured in a process with that allocator."""
    command = [sys.executable, "-m", "benchmarks.run", name, "--measure", str(index), "--device", options.device]
    command += ["--rounds", str(options.rounds)] if options.rounds else []
    command += ["--with-memory"] if allocator == "default" else []
    environment = {**os.environ, **ALLOCATORS[allocator]}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{name}, case {index}, {allocator} allocator: not measured, for the error above; {name}.csv stays")
    return json.loads(done.stdout.splitlines()[-1])


def show(rows):
    """The providers of one case, worst first."""
    for row in sorted(rows, key=lambda row: -row["median_ms"]):
        spread = f"({row['low_ms']:.4g} to {row['high_ms']:.4g})"
        memory = f"{row['extra_mb']:>8.1f} MB" if row["extra_mb"] != "" else ""
        ratio = f"{row['best_baseline_over_this']:>8.2f}x the best baseline" if row["ours"] else ""
        bare = f", {row['this_over_bare']:.3f} of bare" if row["this_over_bare"] != "" else ""
        mark = "*" if row["ours"] else " "
        timing = f"{row['median_ms']:>10.4g} ms {spread:<22}{row['of_ceiling']:>6.0%} of ceiling"
        print(f"  {mark} {row['provider']:<30}{timing}{memory}{ratio}{bare}")


def run(name, options):
    """Measure, print and write one benchmark."""
    results = []
    print(f"\n{name}: {import_module(f'benchmarks.{name}').__doc__.strip()}")
    for index, case in enumerate(cases_of(name)):
        if options.case not in case.label:
            continue
        shape = " ".join(f"{key}={value}" for key, value in case.shape.items()).replace("torch.", "")
        for allocator in case.allocators if options.device == "cpu" else ("default",):
            print(f" {case.label}: {shape}; {allocator} allocator")
            rows = in_subprocess(name, index, allocator, options)
            show(rows)
            backend = os.environ.get("LOCKIN_FAST_BACKEND", "")
            facts = {
                "op": " ".join(case.ops),
                "case": case.label,
                "shape": shape,
                "device": options.device,
                "backend": backend,
            }
            results += [{**facts, "allocator": allocator, **row} for row in rows]
    if results and not options.case:
        print(f" written to {write_csv(f'{options.prefix}{name}', results)}")
    return results


def parser():
    made = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__)
    made.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(names())}; all if none is given")
    made.add_argument("--case", default="", help="only cases whose label holds this; nothing is written then")
    made.add_argument("--rounds", type=int, help="instead of each case's own")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--prefix", default="", help=argparse.SUPPRESS)
    made.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    made.add_argument("--with-memory", action="store_true", help=argparse.SUPPRESS)
    return made


def main(arguments=None):
    options = parser().parse_args(arguments)
    unknown = sorted(set(options.names) - set(names()))
    if unknown:
        sys.exit(f"unknown benchmark {unknown[0]!r}; expected some of {', '.join(names())}, or none for all")
    if options.measure is not None:
        case = cases_of(options.names[0])[options.measure]
        print(json.dumps(measure(case, options.rounds, options.device, options.with_memory)))
        return
    print(describe(provenance()))
    for name in options.names or names():
        try:
            run(name, options)
        except KeyboardInterrupt:
            sys.exit(f"interrupted: {name} is not written, what was measured before it is")


if __name__ == "__main__":
    main()
