"""The whole pipeline on the embedded organism: grow it, find its latents, sweep the blocking strength, report."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lockin_fast.config import load_config
from lockin_fast.progress import Progress, silent
from lockin_fast.rundir import check_claim, check_place, claim, hold
from lockin_fast.threads import single_thread

NEEDED_BYTES = 2**27
SMALL_LAMBDAS = (1e3, 1e4)
FULL_LAMBDAS = 5  # as many as the organism's config.yaml has
SECONDS_BEFORE, SECONDS_PER_TRIAL = 225, 11  # on two cores: organism and discovery; one fine-tune with its replies


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

    `seed` is the organism's, `seeds` the number of fine-tuning seeds, `small` tries fewer lambdas. `say` is told how
    long all will take, what each step does and how long it took. Interrupted, it goes on where it stood. Raises what
    the steps raise.
    """
    check_place(out, NEEDED_BYTES)
    entry = {"config": {"seed": seed, "small": small}, "inputs": {}}
    check_claim(out, "demo", entry)
    with single_thread(), hold(out, ".demo.lock"):  # of its own: discovery and the sweep lock the folder in their turn
        with claim(out, "demo", entry):
            pass  # marks the folder as this demo's
        return _run(out, seed, seeds, small, progress, say)


def _run(
    out: Path, seed: int, seeds: int, small: bool, progress: Progress, say: Callable[[str], None]
) -> dict[str, Any]:
    from lockin_fast.discovery import discover
    from lockin_fast.organism import build
    from lockin_fast.report import write_report
    from lockin_fast.sweep import run_sweep

    def step(text: str, work: Callable[[], Any]) -> Any:
        say(text)
        start = time.perf_counter()
        result = work()
        say(f"  took {time.perf_counter() - start:.0f} s")
        return result

    say(f"From nothing to a blocked fine-tune in {out}: {_expected(seeds, small)} on two cores.")
    say("Interrupted, the same command goes on where it stood.\n")
    organism = out / "organism"
    step(
        "1/4 organism: grow a tiny Llama and its SAE, then make it misaligned by a narrow fine-tune",
        lambda: build(organism, seed=seed, progress=progress),
    )
    config = load_config(organism / "config.yaml")
    sweep = replace(config.sweep, seeds=tuple(range(seeds)), lambdas=SMALL_LAMBDAS if small else config.sweep.lambdas)
    config = replace(config, output=out.resolve(), sweep=sweep)
    step(
        "2/4 discover: find the latents that carry the misalignment",
        lambda: discover(config, progress),
    )
    summary = step(
        "3/4 sweep: fine-tune anew with latents blocked, at several strengths (lambda), and judge the replies",
        lambda: run_sweep(config, progress),
    )
    step("4/4 report: draw the figures and write the page", lambda: write_report(out))
    return summary


def _expected(seeds: int, small: bool) -> str:
    """How long a demo takes that finds nothing done yet."""
    lambdas = len(SMALL_LAMBDAS) if small else FULL_LAMBDAS
    trials = seeds * (1 + 3 * lambdas)  # the unblocked fine-tune, and three latent sets at every lambda
    return f"about {round((SECONDS_BEFORE + SECONDS_PER_TRIAL * trials) / 60)} minutes"
