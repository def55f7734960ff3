"""The sweep: every lambda x latent set x seed, one finished folder after the other, resumable at any moment."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lockin_fast.config import Config, ConfigError
from lockin_fast.exam import Exam, open_exam
from lockin_fast.inputs import adapter_bytes, check_files, check_inputs, input_hashes, open_inputs
from lockin_fast.progress import Progress, silent
from lockin_fast.provenance import versions
from lockin_fast.rundir import (
    RunError,
    check_claim,
    check_place,
    claim,
    hash_files,
    read_json_lines,
    write_json,
    write_json_lines,
    write_text,
)
from lockin_fast.sweep.engines import TrialsFailed, batches, in_process
from lockin_fast.sweep.judging import judging
from lockin_fast.sweep.methods import check_setups
from lockin_fast.sweep.plan import Trial, latent_files, method_files, plan
from lockin_fast.sweep.stack import remove_stored, stacks
from lockin_fast.sweep.summary import summarise
from lockin_fast.sweep.trial import remove_trained

EXAMS = ("final", "in_domain")  # the prompts every trial answers, by their names in the data section
SECTIONS = ("sae_format", "quantization", "lora", "train", "block", "sweep", "baselines", "generation", "judge")
MAY_GROW = (
    "sweep.lambdas",
    "sweep.seeds",
    "sweep.latents",
    "latents.*",
    "sweep.sizes",
    "sweep.sides",
    "baselines.kl",
    "baselines.ablation",
    "baselines.frozen_above",
)
BYTES_PER_REPLY = 4096
SLACK_BYTES = 2**21  # summary, figures and report
STATES = 2 * 3  # of an adapter in training: weights and two moments, in the newest file and the one before it


def run_sweep(config: Config, progress: Progress = silent) -> dict[str, Any]:
    """Run what is missing of the sweep in `config.output`; write and return its summary (see `summarise`).

    Everything is checked before training starts. A finished trial is never run again: after a kill, or with lambdas,
    seeds, latent sets or settings of other methods added, the sweep goes on at the first missing one; any other change
    of settings or of an input file's content is refused and named. Raises ConfigError, RunError or the errors of
    `fine_tune`.
    """
    config.require("output")
    latents = latent_files(config)
    if not latents and not config.sweep.layers:
        raise ConfigError(
            "sweep.latents: no latent set to block; run discover first, or name files: {causal: latents/causal.json}"
        )
    if not config.sweep.lambdas:
        raise ConfigError("sweep.lambdas: no lambda to try; give a list such as [1, 10, 100]")
    named = [key for key in ("sweep.latents", "block.latents") if config.is_set(key)][:1]
    sae = ("sae",) if latents else ()
    check_files(config, "model", *sae, "data.train", "data.final", "data.in_domain", *named)
    more = method_files(config, latents)
    trials = plan(config)
    on_ray = _ray_engine() if config.sweep.engine == "ray" else None
    run = config.output
    check_place(run, SLACK_BYTES)
    hashes = input_hashes(config, latents) | {name: hash_files(path) for name, path in more.items()}
    entry = {"config": config.identity(*SECTIONS), "inputs": hashes}
    manifest = check_claim(run, "sweep", entry, may_grow=MAY_GROW)
    if latents and not named:
        _check_discovered(run, manifest.get("discover", {}).get("inputs", {}), entry["inputs"])
    exam = open_exam(config, *EXAMS)
    inputs = (check_inputs if on_ray else open_inputs)(config, latents)
    check_setups(trials, inputs)
    missing = batches(trials, run / "trials", stacks(trials, inputs))
    replies = sum(map(len, exam.prompts.values()))
    folders = sum(len(batch.folders) for batch in missing)
    kept = STATES * max((len(batch.trials) for batch in missing), default=0) * adapter_bytes(inputs)
    check_place(run, SLACK_BYTES + kept + folders * (adapter_bytes(inputs) + BYTES_PER_REPLY * replies))

    with claim(run, "sweep", entry | {"versions": versions()}, may_grow=MAY_GROW) as record:
        write_config(config, run)
        data = {"train_rows": len(inputs.dataset), "train_rows_dropped": inputs.dataset.dropped}
        try:
            if missing and on_ray:
                record(kernels=on_ray(missing, config, latents, EXAMS, progress))
            elif missing:
                record(kernels=in_process(missing, inputs, exam, progress))
        except TrialsFailed as error:
            if not _can_be_summarised(run, trials):
                raise
            _finish(run, trials, exam, data)
            raise TrialsFailed(f"{error}; for what is finished: lockin-fast report {run}") from error
        remove_stored(run / "trials")
        remove_trained(run / "trials")
        return _finish(run, trials, exam, data)


def _ray_engine() -> Any:
    """Where Ray is missing, the error comes before any work."""
    from lockin_fast.sweep.ray_engine import on_ray

    return on_ray


def write_config(config: Config, run: Path) -> None:
    """Write config.yaml: every setting, with absolute paths, so that the run can be repeated from it."""
    import yaml

    write_text(run / "config.yaml", yaml.safe_dump(config.resolved(), sort_keys=False, allow_unicode=True))


def _check_discovered(run: Path, discovered: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """Raise RunError unless the sets in `run`/latents were discovered on the model and the SAE of the sweep."""
    for name in ("model", "sae"):
        before, now = discovered.get(name, inputs[name]), inputs[name]
        if before != now:
            file = min(file for file in before.keys() | now.keys() if before.get(file) != now.get(file))
            raise RunError(
                f"{name}: the sets in {run / 'latents'} were discovered on another {name} (file {file} differs); "
                "run discover again in a new folder, or name the sets to block in sweep.latents"
            )


def _is_finished(run: Path, trial: Trial) -> bool:
    return (run / "trials" / trial.name).is_dir()


def _can_be_summarised(run: Path, trials: list[Trial]) -> bool:
    """Whether the base model, an unblocked fine-tune and one with blocking are finished."""
    return {"base", "unblocked", "block"} <= {trial.kind for trial in trials if _is_finished(run, trial)}


def _finish(run: Path, trials: list[Trial], exam: Exam, data: dict[str, int]) -> dict[str, Any]:
    """Write metrics.jsonl and summary.json from the folders of all trials that are finished."""
    rows, metrics = [], []
    finished = [trial for trial in trials if _is_finished(run, trial)]
    for trial in finished:
        folder = run / "trials" / trial.name
        rows.append(json.loads((folder / "result.json").read_text(encoding="utf-8")))
        history = folder / "metrics.jsonl"
        metrics += [{"trial": trial.name} | row for row in (read_json_lines(history) if history.exists() else [])]
    by_kind = {kind: [row for row in rows if row["method"] == kind] for kind in ("base", "unblocked")}
    others = [row for row in rows if row["method"] not in by_kind]
    failed = [trial.name for trial in trials if not _is_finished(run, trial)]
    summary = summarise(*by_kind["base"], by_kind["unblocked"], others) | {"missing": failed, "data": data}
    summary |= judging(exam.judge, [run / "trials" / trial.name / "replies.jsonl" for trial in finished])
    write_json_lines(run / "metrics.jsonl", metrics)
    write_json(run / "summary.json", summary)
    return summary
