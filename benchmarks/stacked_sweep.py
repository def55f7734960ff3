"""A sweep of 12 lambdas on the organism: one stack against runs one after the other, whole trials.

    python -m benchmarks.stacked_sweep [--organism FOLDER] [--lambdas 12] [--steps 120] [--rounds 3] [--case TEXT]

A trial is loading the model and the data, training, answering all prompts and writing its folder. Single runs do all of
it for every lambda, a stack loads once. Every sweep runs in a process of its own, which has imported everything and
trained one step before the clock starts; sweeps are interleaved. Reported: seconds (median), their ratio, the highest
resident memory of the processes, and how far the adapters are from those of single runs. Written to
results/stacked_sweep.csv. The organism is grown where FOLDER holds none, in some minutes.
"""

import argparse
import dataclasses
import json
import logging
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.measure import describe, provenance, write_csv

SEED, LATENTS = 0, 20


@dataclasses.dataclass(frozen=True)
class Case:
    """A base model and a batch; `targets` are the ratios to reach against single runs and the eager path."""

    label: str
    quantization: str
    batch_size: int
    micro_batch_size: int
    targets: dict[str, float]


CASES = (
    Case("micro-batch 4, fp32 base", "none", 4, 4, {"single": 3.0, "eager": 5.0}),
    Case("micro-batch 4, 4-bit base", "nf4", 4, 4, {"single": 4.0}),
    Case("micro-batch 1, 4-bit base", "nf4", 1, 1, {"single": 7.0}),
    Case("batch 32, fp32 base", "none", 32, 32, {"single": 1.5}),
)


def main(arguments=None):
    options = parser().parse_args(arguments)
    if options.measure:
        print(json.dumps(measured(options, CASES[options.number])))
        return
    grown(options.organism)
    print(describe(provenance()))
    rows = []
    for number, case in enumerate(CASES):
        if options.case not in case.label:
            continue
        print(f"\n{case.label}: {options.lambdas} lambdas, {options.steps} steps")
        with tempfile.TemporaryDirectory() as kept:
            taken = {name: [] for name in ("stacked", *case.targets)}
            for turn in range(options.rounds):
                for name in taken:
                    taken[name].append(in_subprocess(options, number, name, Path(kept) / f"{name}{turn}"))
            if case.micro_batch_size > 1:
                in_subprocess(options, number, "halved", Path(kept) / "halved")
                floor = differences(Path(kept) / "halved", Path(kept) / "single0")
                print(f"  single runs in half the micro-batch, apart by rounding: weights differ by {floor[0]}"
                      f" (of a matrix' largest: {floor[1]})")  # fmt: skip
            rows += [row_of(case, name, runs, taken["stacked"], Path(kept)) for name, runs in taken.items()]
    if rows and not options.case:
        print(f" written to {write_csv('stacked_sweep', rows)}")


def row_of(case, name, runs, stacked, kept):
    """One provider's row of the results, printed."""
    seconds, ours = (statistics.median(run["seconds"] for run in of) for of in (runs, stacked))
    peak, our_peak = (max(run["peak_mb"] for run in of) for of in (runs, stacked))
    row = {
        "case": case.label,
        "provider": name,
        "seconds": round(seconds, 2),
        "low": round(min(run["seconds"] for run in runs), 2),
        "high": round(max(run["seconds"] for run in runs), 2),
        "loading": round(statistics.median(run["loading"] for run in runs), 2),
        "training": round(statistics.median(run["training"] for run in runs), 2),
        "peak_mb": round(peak),
        "this_over_stacked": round(seconds / ours, 2),
        "target": case.targets.get(name, ""),
        "stacked_peak_over_this": round(our_peak / peak, 2),
        **dict(zip(("difference", "worst_matrix"), differences(kept / "stacked0", kept / f"{name}0"), strict=True)),
        "same_replies": "" if name == "stacked" else round(same_replies(kept / "stacked0", kept / f"{name}0"), 3),
    }
    ratio = "" if name == "stacked" else (
        f"  stacked is {row['this_over_stacked']}x faster (target {row['target']}x), its peak memory "
        f"{row['stacked_peak_over_this']}x; weights differ by {row['difference']} (of a matrix' largest: "
        f"{row['worst_matrix']}), same replies {row['same_replies']:.1%}"
    )  # fmt: skip
    print(f"  {name:<8} {seconds:7.2f} s ({row['low']} to {row['high']}; loading {row['loading']}, training "
          f"{row['training']}), {row['peak_mb']} MB{ratio}")  # fmt: skip
    return row


def differences(mine, theirs):
    """The largest difference of a weight, relative to the largest weight of its adapter, and of its matrix."""
    from safetensors.torch import load_file

    of_adapter = of_matrix = 0.0
    for folder in theirs.iterdir():
        one, other = (load_file(path / "adapter_model.safetensors") for path in (mine / folder.name, folder))
        apart = {key: float((one[key] - other[key]).abs().max()) for key in other}
        size = {key: float(other[key].abs().max()) for key in other}
        of_adapter = max(of_adapter, max(apart.values()) / max(size.values()))
        of_matrix = max(of_matrix, *(apart[key] / size[key] for key in other))
    return f"{of_adapter:.1e}", f"{of_matrix:.1e}"


def same_replies(mine, theirs):
    """The share of replies that are equal."""
    pairs = [
        (json.loads(a)["reply"], json.loads(b)["reply"])
        for folder in theirs.iterdir()
        for a, b in zip((mine / folder.name / "replies.jsonl").open(), (folder / "replies.jsonl").open(), strict=True)
    ]
    return sum(a == b for a, b in pairs) / len(pairs)


def in_subprocess(options, number, name, out):
    command = [
        sys.executable, "-m", "benchmarks.stacked_sweep", "--measure", name, "--number", str(number), "--out", str(out),
        "--organism", str(options.organism), "--lambdas", str(options.lambdas), "--steps", str(options.steps),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measured(options, case):
    """One sweep in this process: its seconds, in all and in parts, and its highest resident memory."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    config, latents = configured(options, case)
    sweep = {"stacked": stacked, "single": single, "eager": eager, "halved": halved}[options.measure]
    with tempfile.TemporaryDirectory() as folder:  # a first step, so that everything lazy is loaded
        short = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=1))
        sweep(short, latents, trials(options)[:2], Path(folder) / "warm")
    begin = time.perf_counter()
    loading, training = sweep(config, latents, trials(options), options.out)
    return {
        "seconds": time.perf_counter() - begin,
        "loading": loading,
        "training": training,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def configured(options, case):
    """The organism's own configuration with this batch, and a set of latents: which ones does not matter here."""
    from lockin_fast.blocking import LatentSet
    from lockin_fast.config import load_config

    path = Path(tempfile.mkdtemp()) / "causal.json"
    overrides = [
        f"quantization={case.quantization}", f"train.steps={options.steps}", f"train.batch_size={case.batch_size}",
        f"train.micro_batch_size={case.micro_batch_size}", f"sweep.latents={{causal: {path}}}",
    ]  # fmt: skip
    config = load_config(options.organism / "config.yaml", overrides)
    torch.manual_seed(SEED)
    chosen = torch.randperm(512)[:LATENTS].tolist()
    LatentSet(chosen[: LATENTS // 2], chosen[LATENTS // 2 :], layer=config.block.layer).save(path)
    return config, {"causal": path}


def trials(options):
    from lockin_fast.sweep.plan import Trial

    return [Trial("causal", 10 ** (1 + 4 * n / max(options.lambdas - 1, 1)), SEED) for n in range(options.lambdas)]


def opened(config, latents):
    """(inputs, exam, seconds)."""
    from lockin_fast.exam import open_exam
    from lockin_fast.inputs import open_inputs

    begin = time.perf_counter()
    return open_inputs(config, latents), open_exam(config, "final", "in_domain"), time.perf_counter() - begin


class Clock:
    """A progress that takes the time of the steps."""

    def __init__(self, steps):
        self.steps, self.begin, self.seconds = steps, time.perf_counter(), 0.0

    def __call__(self, done, total):
        if done <= self.steps:
            self.seconds = time.perf_counter() - self.begin


def stacked(config, latents, sweep, out):
    from lockin_fast.sweep.stack import run_stack

    inputs, exam, loading = opened(config, latents)
    clock = Clock(config.train.steps)
    run_stack(sweep, inputs, exam, [out / trial.name for trial in sweep], clock)
    return loading, clock.seconds


def single(config, latents, sweep, out):
    from lockin_fast.sweep.trial import run_trial

    loading = training = 0.0
    for trial in sweep:
        inputs, exam, seconds = opened(config, latents)
        clock = Clock(config.train.steps)
        run_trial(trial, inputs, exam, out / trial.name, clock)
        loading, training = loading + seconds, training + clock.seconds
    return loading, training


def halved(config, latents, sweep, out):
    """Single runs in micro-batches of half the size: what rounding alone, amplified by training, does to weights."""
    train = dataclasses.replace(config.train, micro_batch_size=config.train.micro_batch_size // 2)
    return single(dataclasses.replace(config, train=train), latents, sweep, out)


def eager(config, latents, sweep, out):
    from benchmarks.eager_adapters_off import eager_fine_tune
    from lockin_fast.exam import question
    from lockin_fast.generation import generate
    from lockin_fast.lora import adapter
    from lockin_fast.rundir import write_json_lines
    from lockin_fast.sweep.trial import judged

    loading = training = 0.0
    answers = {"max_new_tokens": config.generation.max_new_tokens, "batch_size": config.generation.batch_size,
               "temperature": config.generation.temperature, "seed": SEED}  # fmt: skip
    for trial in sweep:
        inputs, exam, seconds = opened(config, latents)
        begin, folder = time.perf_counter(), out / trial.name
        eager_fine_tune(
            inputs.model, inputs.tokenizer, inputs.dataset, folder, lora=config.lora,
            settings=dataclasses.replace(config.train, seed=SEED), penalty=inputs.penalty("causal", trial.weight),
        )  # fmt: skip
        loading, training = loading + seconds, training + time.perf_counter() - begin
        with adapter(inputs.model, folder) as model:
            rows = []
            for kind, records in exam.prompts.items():
                asked = [question(record) for record in records]
                rows += judged(exam, kind, generate(model, inputs.tokenizer, asked, **answers))
        write_json_lines(folder / "replies.jsonl", rows)
    return loading, training


def grown(folder):
    from lockin_fast.organism import build

    if not (folder / "config.yaml").exists():
        print(f"growing the organism in {folder}")
        build(folder, seed=SEED)


def parser():
    made = argparse.ArgumentParser(prog="benchmarks.stacked_sweep", description=__doc__.splitlines()[0])
    made.add_argument("--organism", type=Path, default=Path("benchmark-organism"))
    made.add_argument("--lambdas", type=int, default=12)
    made.add_argument("--steps", type=int, default=120)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--case", default="", help="only cases whose label holds this; nothing is written then")
    made.add_argument("--measure", choices=("stacked", "single", "eager", "halved"), help=argparse.SUPPRESS)
    made.add_argument("--number", type=int, help=argparse.SUPPRESS)
    made.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return made


if __name__ == "__main__":
    main()
