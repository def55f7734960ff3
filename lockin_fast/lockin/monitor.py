"""Every metric at every checkpoint of a run, with the base model loaded once: what `lockin-fast measure` does."""

import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lockin_fast.config import Config, ConfigError
from lockin_fast.discovery.shift_table import parquet_is_installed
from lockin_fast.exam import open_exam, read_prompts
from lockin_fast.inputs import check_files, open_model, open_tokenizer
from lockin_fast.judges import judge_files
from lockin_fast.lockin.checkpoints import WEIGHTS, Checkpoint, broken_weight, check_adapter, find_checkpoints
from lockin_fast.lockin.gather import Gatherer
from lockin_fast.lockin.metrics import Metric, metrics_of
from lockin_fast.lockin.needs import Ratings
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
MAY_GROW = ("measure.metrics", "checkpoints.*", "judge.*")


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
    check_files(config, "model", "data.final")
    checkpoints = find_checkpoints(settings.checkpoints, settings.steps, base=settings.base)
    _check_scipy()
    check_place(run, NEEDED_BYTES)
    entry = _entry(config, checkpoints, metrics)
    check_claim(run, "measure", entry, may_grow=MAY_GROW)
    todo = _todo(Measurements(run / LINES), checkpoints, settings.metrics)
    monitor = _Monitor(config, metrics, todo, progress) if todo else None
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
    """The base model and its prompts, opened and checked, and the checkpoints that are to be measured."""

    def __init__(self, config: Config, metrics: Sequence[Metric], todo: Sequence[Checkpoint], progress: Progress):
        self.config, self.metrics, self.todo, self.progress = config, metrics, todo, progress
        rated = _needs_judge(metrics)
        exam = open_exam(config, "final") if rated else None
        records = exam.prompts["final"] if exam else read_prompts(config, "final")
        wanted = min(config.measure.prompts or len(records), len(records))
        self.records = [records[i * len(records) // wanted] for i in range(wanted)]
        self.judge = exam and exam.judge
        self.tokenizer, self.model = open_tokenizer(config), open_model(config)
        for one in todo:
            if one.folder:
                check_adapter(self.model, one.folder)

    def measure(self, known: Measurements) -> None:
        """Measure what is missing of every checkpoint, and write it line by line."""
        config = self.config
        gatherer = Gatherer(
            self.tokenizer,
            {"final": self.records},
            self.judge,
            RepliesKept(config.output / FOLDER / "replies.jsonl"),
            config.generation,
            config.measure.seed,
            self.progress,
        )
        for done, one in enumerate(self.todo):
            self.progress("checkpoints", done, len(self.todo))
            started = time.perf_counter()
            names = known.missing(one.step, config.measure.metrics)
            if not names:  # measured by another process, until the folder was free
                continue
            values, failed = self._values(gatherer, one, names)
            details = {"failed": failed, "seconds": round(time.perf_counter() - started, 3)}
            path = str(one.folder) if one.folder else "base"
            known.add([{"step": one.step, "checkpoint": path, "metrics": values, "details": details}])
        self.progress("checkpoints", len(self.todo), len(self.todo))

    def _values(
        self, gatherer: Gatherer, one: Checkpoint, names: Sequence[str]
    ) -> tuple[dict[str, float | None], dict[str, str]]:
        """({metric: value}, {metric: why it has none}) of a checkpoint."""
        if one.folder and (weight := broken_weight(one.folder)):
            return dict.fromkeys(names), dict.fromkeys(names, f"adapter weight {weight} is not finite")
        metrics = [metric for metric in self.metrics if set(metric.names) & set(names)]
        needs = {need for metric in metrics for need in metric.needs}
        with adapter(self.model, one.folder) as model:
            gathered = gatherer.gather(model.eval(), one.step, needs)
        values: dict[str, float | None] = dict.fromkeys(names)
        failed: dict[str, str] = {}
        for metric in metrics:
            wanted = [name for name in metric.names if name in values]
            try:
                found = metric.measure(gathered)
            except ValueError as error:
                failed |= dict.fromkeys(wanted, str(error))
                continue
            for name in wanted:
                if math.isfinite(found[name]):
                    values[name] = float(found[name])
                else:
                    failed[name] = f"it is {found[name]}"
        return values, failed


def _needs_judge(metrics: Sequence[Metric]) -> bool:
    return any(isinstance(need, Ratings) for metric in metrics for need in metric.needs)


def _todo(known: Measurements, checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> list[Checkpoint]:
    return [one for one in checkpoints if known.missing(one.step, names)]


def _entry(config: Config, checkpoints: Sequence[Checkpoint], metrics: Sequence[Metric]) -> dict[str, Any]:
    """What makes this measurement another one; the judge's files count where it is asked."""
    identity = config.identity("quantization", "generation", "judge")
    measure = {f"measure.{name}": getattr(config.measure, name) for name in ("prompts", "seed")}
    files = {"model": config.model, "data.final": config.data.final}
    files |= judge_files(config.judge) if _needs_judge(metrics) else {}
    files |= {f"checkpoints.{one.step}": one.folder for one in checkpoints if one.folder}
    return {
        "config": identity | measure | {"measure.metrics": sorted(config.measure.metrics)},
        "inputs": {name: hash_files(path) for name, path in files.items()},
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


