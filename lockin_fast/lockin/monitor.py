"""Every metric at every checkpoint of a run, with the base model loaded once: what `lockin-fast measure` does."""

import itertools
import json
import math
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lockin_fast.config import Config, ConfigError
from lockin_fast.discovery.shift_table import parquet_is_installed
from lockin_fast.lockin.checkpoints import WEIGHTS, Checkpoint, broken_weight, check_adapter, find_checkpoints
from lockin_fast.lockin.measure_inputs import input_files, needs_of, open_measure_inputs
from lockin_fast.lockin.metrics import Metric, metrics_of
from lockin_fast.lockin.needs import AtBase, AtPrevious, Gathered, Latents, Need, States
from lockin_fast.lockin.record import Measurements, RepliesKept
from lockin_fast.lockin.series_file import write_series
from lockin_fast.lockin.summary import summarise_run
from lockin_fast.lockin.triggers import TRIGGERS
from lockin_fast.lora import adapter
from lockin_fast.progress import Progress, silent
from lockin_fast.rundir import check_claim, check_place, claim, hash_files, write_json, write_text

LINES, SUMMARY, TABLE = "lockin.jsonl", "lockin.json", "lockin.parquet"
FOLDER = "lockin"  # in the run, of what is kept meanwhile
NEEDED_BYTES = 2**24
# What was not there before may be; of what was there, only the list of metrics may become longer.
MAY_GROW = (
    "measure.metrics", "checkpoints.*", "judge.path*", "judge.kind*", "judge.rubric*", "judge.also*", "block.layer*",
    "measure.pairs*", "measure.requests*", "measure.paraphrases*", "measure.steering.*", "sae*",
)  # fmt: skip
BASE = Checkpoint(0, None)


class _Planned(NamedTuple):
    """A checkpoint with the metrics that it lacks, and the one before it where one of these compares the two."""

    now: Checkpoint
    before: Checkpoint | None
    names: list[str]


def run_measure(config: Config, progress: Progress = silent) -> dict[str, Any]:
    """Measure `measure.metrics` at every checkpoint; write lockin.jsonl, lockin.json and lockin.parquet to `output`.

    Returns what lockin.json holds: {"checkpoints", "anomalies"} and what `summarise_run` says. The base model is loaded
    once and adapters are put on it in turn; replies are generated in batches, and shared by all metrics that need them.
    A checkpoint's line is written when it is measured, each batch of replies when it is there, so that a kill costs the
    batch in hand. Checkpoints and metrics may be added later; what is known is not measured again.

    A checkpoint whose weights are not finite, or where a metric cannot be had, has null there and the reason beside it.
    Raises ConfigError before any work, one line that names the setting: a checkpoint that is missing, or of another
    base; a metric that is not known. Needs scipy for the series.
    """
    import yaml

    config.require("output")
    settings, run = config.measure, config.output
    metrics = metrics_of(settings.metrics)
    gate = settings.thresholds.gate
    if not gate or set(gate) - set(TRIGGERS):
        raise ConfigError(
            f"measure.thresholds.gate: expected one or more of {', '.join(TRIGGERS)}, got {', '.join(gate) or 'none'}"
        )
    files = input_files(config, needs_of(metrics))
    checkpoints = find_checkpoints(settings.checkpoints, settings.steps, base=settings.base)
    _check_scipy()
    check_place(run, NEEDED_BYTES)
    entry = _entry(config, checkpoints, files)
    check_claim(run, "measure", entry, may_grow=MAY_GROW)
    plan = _planned(Measurements(run / LINES), checkpoints, settings.metrics, metrics)
    monitor = _Monitor(config, metrics, plan, progress) if plan else None
    with claim(run, "measure", entry, may_grow=MAY_GROW):
        if not (run / "config.yaml").exists():  # else it is that of a sweep
            write_text(run / "config.yaml", yaml.safe_dump(config.resolved(), sort_keys=False, allow_unicode=True))
        known = Measurements(run / LINES)
        if monitor:
            monitor.measure(known)
        steps = [one.step for one in checkpoints]
        series = {name: known.series(steps, name) for name in settings.metrics}
        summary = {
            "checkpoints": [
                {"step": one.step, "checkpoint": one.name, "failed": known.failed[one.step]} for one in checkpoints
            ],
            "anomalies": _same_adapters(checkpoints, entry["inputs"]),
        } | summarise_run(steps, series, settings.thresholds)
        if parquet_is_installed():
            write_series(run / TABLE, steps, [one.name for one in checkpoints], series)
        write_json(run / SUMMARY, summary)
    return json.loads((run / SUMMARY).read_text(encoding="utf-8"))


class _Monitor:
    """The base model and what gathers from it, opened and checked, and the checkpoints that are to be measured."""

    def __init__(self, config: Config, metrics: Sequence[Metric], plan: Sequence[_Planned], progress: Progress):
        self.metrics, self.plan, self.progress = metrics, plan, progress
        self.inputs = open_measure_inputs(config, needs_of(metrics))
        self.replies = config.output / FOLDER / "replies.jsonl"
        self.states: dict[Checkpoint, Gathered] = {}  # of the base and of the checkpoint measured last
        for folder in {one.folder for planned in plan for one in (planned.now, planned.before) if one and one.folder}:
            check_adapter(self.inputs.model, folder)

    def measure(self, known: Measurements) -> None:
        """Measure what is planned, and write it line by line."""
        self.kept = RepliesKept(self.replies)
        for done, planned in enumerate(self.plan):
            self.progress("checkpoints", done, len(self.plan))
            started = time.perf_counter()
            one, before = planned.now, planned.before
            if one.folder and (weight := broken_weight(one.folder)):
                why = f"adapter weight {weight} is not finite"
                values, failed = dict.fromkeys(planned.names), dict.fromkeys(planned.names, why)
            else:
                values, failed = self._values(planned)
            seconds = round(time.perf_counter() - started, 3)
            details = {"failed": failed, "previous": before and before.step, "seconds": seconds}
            path = str(one.folder) if one.folder else "base"
            known.add([{"step": one.step, "checkpoint": path, "metrics": values, "details": details}])
        self.progress("checkpoints", len(self.plan), len(self.plan))

    def _values(self, planned: _Planned) -> tuple[dict[str, float | None], dict[str, str]]:
        """({metric: value}, {metric: why it has none}) of a checkpoint."""
        metrics = [metric for metric in self.metrics if set(metric.names) & set(planned.names)]
        needs = {need for metric in metrics for need in metric.needs}
        gathered: dict[Need, Any] = {Latents(): self.inputs.sae}
        for wrap, other in ((AtBase, BASE), (AtPrevious, planned.before)):
            if wanted := {need.need for need in needs if isinstance(need, wrap)}:
                found = self._states(other, wanted) if other else {}
                gathered |= {wrap(need): value for need, value in found.items()}
        values: dict[str, float | None] = dict.fromkeys(planned.names)
        failed: dict[str, str] = {}
        with adapter(self.inputs.model, planned.now.folder) as model:
            gathered |= self.inputs.gatherer.gather(model.eval(), planned.now.step, needs, self.kept, self.progress)
            for metric in metrics:
                wanted = [name for name in metric.names if name in values]
                if any(need not in gathered for need in metric.needs):
                    failed |= dict.fromkeys(wanted, "there is no checkpoint before it that could be measured")
                    continue
                try:
                    found = metric.measure(gathered)
                except ValueError as error:
                    failed |= dict.fromkeys(wanted, str(error))
                    continue
                for name in wanted:
                    if math.isfinite(found[name]):
                        values[name] = float(found[name])
                    else:
                        failed[name] = "it is not defined here: what it divides by is zero"
        self._keep_states(planned.now, gathered)
        return values, failed

    def _states(self, one: Checkpoint, wanted: Collection[States]) -> Gathered:
        """Hidden states of another checkpoint, read now where they are not at hand; none of one with broken weights."""
        at_hand = self.states.get(one, {})
        if not set(wanted) <= set(at_hand):
            if one.folder and broken_weight(one.folder):
                return {}
            with adapter(self.inputs.model, one.folder) as model:
                at_hand = self.inputs.gatherer.gather(model.eval(), one.step, wanted, self.kept)
            self._keep_states(one, at_hand)
        return {need: at_hand[need] for need in wanted}

    def _keep_states(self, one: Checkpoint, gathered: Gathered) -> None:
        base = self.states.get(BASE, {})
        now = {need: value for need, value in gathered.items() if isinstance(need, States)}
        self.states = {BASE: base, one: now} if one != BASE else {BASE: base | now}


def _planned(
    known: Measurements, checkpoints: Sequence[Checkpoint], names: Sequence[str], metrics: Sequence[Metric]
) -> list[_Planned]:
    """What is still to be measured, in the order of steps."""
    relative = [name for metric in metrics if metric.is_relative for name in metric.names]
    found = []
    for before, now in zip([None, *checkpoints], checkpoints, strict=False):
        if missing := known.missing(now.step, before and before.step, names, relative):
            needs_before = bool(set(missing) & set(relative))
            found.append(_Planned(now, before if needs_before else None, missing))
    return found


def _entry(config: Config, checkpoints: Sequence[Checkpoint], files: Mapping[str, Path]) -> dict[str, Any]:
    """What makes this measurement another one."""
    identity = config.identity("quantization", "generation", "judge", "sae_format")
    identity |= {f"measure.{name}": getattr(config.measure, name) for name in ("base", "prompts", "seed")}
    suites = [suite if isinstance(suite, str) else suite.name for suite in config.measure.steering]
    identity |= {"measure.metrics": sorted(config.measure.metrics), "measure.steering": suites}
    own = [name for name in ("requests", "paraphrases") if getattr(config.measure, name)]
    identity |= {"measure.own_files": own}
    adapters = {f"checkpoints.{one.step}": one.folder for one in checkpoints if one.folder}
    return {
        "config": identity | {"block.layer": config.block.layer},
        "inputs": {name: hash_files(path) for name, path in {**files, **adapters}.items()},
    }


def _same_adapters(checkpoints: Sequence[Checkpoint], hashes: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A sentence for every two neighbours among equal adapters: a final one that poses as step 0 shows no change."""
    by_content: dict[str, list[Checkpoint]] = {}
    for one in checkpoints:
        if one.folder:
            by_content.setdefault(hashes[f"checkpoints.{one.step}"][WEIGHTS], []).append(one)
    return [
        f"steps {one.step} ({one.name}) and {other.step} ({other.name}) hold the same weights: between them nothing "
        "can change, and one of them is not what its step says"
        for same in by_content.values()
        for one, other in itertools.pairwise(same)
    ]


def _check_scipy() -> None:
    from importlib.util import find_spec

    if find_spec("scipy") is None:
        raise ImportError("series over checkpoints need scipy: pip install 'lockin-fast[lockin]'")


