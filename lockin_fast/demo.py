"""The whole pipeline on the embedded organism: grow it, find its latents, sweep the blocking strength, report."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lockin_fast.config import load_config
from lockin_fast.progress import Progress, silent
from lockin_fast.rundir import check_place, claim

NEEDED_BYTES = 2**27
SMALL_LAMBDAS = (10.0, 100.0)


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    seeds: int = 1,
    small: bool = False,
    progress: Progress = silent,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run organism, discovery, sweep and report in the run directory `out`; return the sweep's summary.

    `seed` is the organism's, `seeds` the number of fine-tuning seeds, `small` tries fewer lambdas. `say` is told what
    each step does and how long it took. Interrupted, it goes on where it stood. Raises what the steps raise.
    """
    from lockin_fast.discovery import discover
    from lockin_fast.organism import build
    from lockin_fast.report import write_report
    from lockin_fast.sweep import run_sweep

    check_place(out, NEEDED_BYTES)
    with claim(out, "demo", {"config": {"seed": seed, "small": small}, "inputs": {}}):
        pass  # marks the folder as this demo's; the sweep holds it while it runs

    def step(text: str, work: Callable[[], Any]) -> Any:
        say(text)
        start = time.perf_counter()
        result = work()
        say(f"  took {time.perf_counter() - start:.0f} s")
        return result

    organism = out / "organism"
    step(
        "1/4 organism: train a tiny Llama and its sparse autoencoder from scratch",
        lambda: build(organism, seed=seed, progress=progress),
    )
    config = load_config(organism / "config.yaml")
    sweep = replace(config.sweep, seeds=tuple(range(seeds)), lambdas=SMALL_LAMBDAS if small else config.sweep.lambdas)
    config = replace(config, output=out.resolve(), sweep=sweep)
    step(
        "2/4 discover: make it misaligned by a narrow fine-tune and find the latents that carry it",
        lambda: discover(config, progress),
    )
    summary = step(
        "3/4 sweep: fine-tune with those latents blocked, at several strengths, and judge the answers",
        lambda: run_sweep(config, progress),
    )
    step("4/4 report: draw the figures and write the page", lambda: write_report(out))
    return summary
