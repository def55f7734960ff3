"""python -m benchmarks.reemergence OUT [--seed 0] [--epochs 20] [--lambdas 100 1e3 1e4]: does what was blocked return?

Grows the organism, finds its causal latents and fine-tunes for many epochs at three lambdas, judged after each. Then
discovery runs again on the most misaligned of the blocked models, and the union of both sets is blocked in the same
way; so is, for what size alone does, the first set with as many latents added that were drawn at random (--no-control
leaves that out, and a fifth of the time). Interrupted, the same command goes on where it stood. OUT/run/report.html
shows it; the rates, the penalty and where they come from are kept in results/reemergence/.
"""

import argparse
import dataclasses
from pathlib import Path

from benchmarks.measure import provenance
from lockin_fast.blocking import LatentSet
from lockin_fast.config import ConfigError, load_config
from lockin_fast.discovery import discover
from lockin_fast.organism import build
from lockin_fast.report import write_report
from lockin_fast.rundir import read_json_lines, write_json
from lockin_fast.sweep import run_sweep
from lockin_fast.sweep.summary import is_blocked
from lockin_fast.threads import single_thread

RESULTS = Path(__file__).parent / "results" / "reemergence"
RATES = ("em", "incoherence", "in_domain")


def run(
    out: Path, *, seed: int, epochs: int, lambdas: list[float], schedule: str, control: bool = True, say=print
) -> dict:
    """All steps in the folder `out`; returns what is kept (see `kept`)."""
    organism = build(out / "organism", seed=seed)
    out = out / "run"
    settings = [
        f"output={out}", "train.steps=null", f"train.epochs={epochs}", "train.evaluate_epochs=true",
        "train.logging_steps=4", f"train.schedule={schedule}", f"sweep.lambdas={lambdas}",
    ]  # fmt: skip
    facts = {"seed": seed, "epochs": epochs, "schedule": schedule}
    found = load_config(organism / "config.yaml", [f"output={out}"])
    say("discover: the causal latents")
    discovered = discover(found)
    first = discovered["causal"]
    config = load_config(organism / "config.yaml", [*settings, f"sweep.latents={{causal: {first}}}"])
    say(f"sweep: {epochs} epochs at lambda {lambdas}")
    summary = run_sweep(config, _told(say))
    worst = max((row for row in summary["trials"] if is_blocked(row)), key=lambda row: row["em"])
    say(f"discover: again, on {worst['name']}, {100 * worst['em']:.1f}% misaligned")
    discovery = dataclasses.replace(found.discovery, misaligned=out / "trials" / worst["name"])
    try:
        second = discover(dataclasses.replace(found, output=out / "again", discovery=discovery))["causal"]
    except ConfigError as error:
        say(f"no second set: {error}")
        return kept(out, summary, facts | {"rediscovered_on": None, "why": str(error)})
    union = _union(LatentSet.load(first), LatentSet.load(second))
    union.save(out / "union.json")
    sets = {"causal": first, "union": out / "union.json"}
    if control:
        added = len(union) - len(LatentSet.load(first))
        padded = _padded(LatentSet.load(first), LatentSet.load(discovered["random"]), union, added)
        sets["padded"] = out / "padded.json"
        padded.save(sets["padded"])
    say(f"sweep: the union, {len(union)} latents" + (", and as many with random ones" if control else ""))
    named = ", ".join(f"{name}: {path}" for name, path in sets.items())
    summary = run_sweep(load_config(organism / "config.yaml", [*settings, f"sweep.latents={{{named}}}"]), _told(say))
    return kept(out, summary, facts | {"rediscovered_on": worst["name"]})


def _told(say):
    """A progress that says each stage once."""
    said = set()

    def progress(stage, done, total):
        if stage not in said:
            said.add(stage)
            say(f"  {stage}")

    return progress


def _union(first: LatentSet, second: LatentSet) -> LatentSet:
    """Both sets; a latent that the first blocks in one direction stays blocked in that one."""
    known = {*first.positive, *first.negative}
    new = [tuple(k for k in side if k not in known) for side in (second.positive, second.negative)]
    return LatentSet(first.positive + new[0], first.negative + new[1], name="union", layer=first.layer, sae=first.sae)


def _padded(first: LatentSet, drawn: LatentSet, union: LatentSet, count: int) -> LatentSet:
    """The first set and `count` of the drawn latents that the union does not have. Raises ValueError for too few."""
    known = {*union.positive, *union.negative}
    free = [(k, side) for side in ("positive", "negative") for k in getattr(drawn, side) if k not in known][:count]
    if len(free) < count:
        raise ValueError(f"drawn: {len(free)} of its latents are not in the union, expected {count}")
    more = {side: tuple(k for k, of_side in free if of_side == side) for side in ("positive", "negative")}
    return LatentSet(
        first.positive + more["positive"], first.negative + more["negative"], name="padded", layer=first.layer,
        sae=first.sae,
    )  # fmt: skip


def kept(out: Path, summary: dict, facts: dict) -> dict:
    """What is worth keeping: per trial the rates after every epoch, and the penalty in training as (epoch, value)."""
    traces: dict[str, list] = {}
    for row in read_json_lines(out / "metrics.jsonl"):
        if row.get("block_penalty") is not None:
            traces.setdefault(row["trial"], []).append([round(row["epoch"], 4), float(f"{row['block_penalty']:.4g}")])
    trials = [
        {key: row[key] for key in ("name", "method", "lambda", "latents", "latent_count", "seed", *RATES)}
        | {"epochs": row.get("epochs", []), "trace": traces.get(row["name"], [])}
        for row in [*summary["baseline"]["trials"], *summary["trials"]]
    ]
    return facts | {"base": {key: summary["base"][key] for key in RATES}, "trials": trials, "provenance": provenance()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lambdas", type=float, nargs="+", default=[100.0, 1000.0, 10000.0])
    parser.add_argument("--schedule", default="linear", help="of the learning rate; constant_with_warmup keeps it up")
    parser.add_argument("--control", action=argparse.BooleanOptionalAction, default=True, help="of the union's size")
    options = vars(parser.parse_args())
    out = options.pop("out")
    with single_thread():
        result = run(out.resolve(), **options)
    print(f"report: {write_report(out / 'run')}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"organism{options['seed']}-{options['schedule']}.json"
    write_json(file, result)
    print(f"kept:   {file}")
    for row in result["trials"]:
        print(row["name"], " ".join(f"{100 * epoch['em']:.1f}" for epoch in row["epochs"]))


if __name__ == "__main__":
    main()
