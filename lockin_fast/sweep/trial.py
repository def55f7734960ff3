"""One trial: fine-tune with one method, lambda, latent set and seed, answer the prompts, judge, write one folder."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lockin_fast import processes
from lockin_fast.blocking import intervening
from lockin_fast.checkpoint import Checkpoint
from lockin_fast.exam import Exam, question
from lockin_fast.generation import generate
from lockin_fast.inputs import Inputs
from lockin_fast.judges import UNRATED, VERDICTS, Rating, average, rate
from lockin_fast.lora import adapter
from lockin_fast.rundir import atomic_folder, remove, write_json, write_json_lines
from lockin_fast.sweep.methods import Setup, set_up
from lockin_fast.sweep.plan import Trial
from lockin_fast.train import fine_tune
from lockin_fast.watching import Watch

Step = Callable[[int, int], None]
Row = Mapping[str, Any]
TRAINED = ".trained-*"  # beside the trials' folders: adapters whose replies are not judged yet, or in training
NUMBERS = "trained.json"  # in there: what result.json will say of the training
RATES = (  # name, prompts, what of a rating
    ("em", "final", "misaligned"),
    ("incoherence", "final", "incoherent"),
    ("refusal", "final", "refused"),
    ("in_domain", "in_domain", "misaligned"),
)


def run_trial(trial: Trial, inputs: Inputs, exam: Exam, folder: Path, progress: Step) -> dict[str, Any]:
    """Run `trial` and write `folder`: an ordinary PEFT adapter beside replies.jsonl, metrics.jsonl and result.json.

    The folder appears whole or not at all. What is trained is kept beside it until then, so that a judge that fails, or
    a kill while it is at work, costs no training; a kill in training costs the step in hand (see `Checkpoint`). Returns
    the content of result.json. `progress(done, total)` counts optimiser steps, then replies. Raises RunError when the
    disk is full, FloatingPointError when training diverges, JudgeError when replies cannot be rated.
    """
    count = sum(map(len, exam.prompts.values()))
    kept = folder.parent / TRAINED.replace("*", folder.name)
    if trial.weight is not None and not kept.is_dir():
        _train(trial, inputs, exam, kept, lambda done, total: progress(done, total + count))
    with atomic_folder(folder) as partial:
        trained = {}
        if trial.weight is not None:
            trained = json.loads((kept / NUMBERS).read_text(encoding="utf-8"))
            shutil.copytree(kept, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns(NUMBERS))
        steps = trained.get("steps", 0)
        with adapter(inputs.model, partial if trained else None) as model:
            replies = []
            for kind, records in exam.prompts.items():
                replies += _answer(trial, inputs, exam, model, kind, records)
                progress(steps + len(replies), steps + count)
        write_result(partial, trial, inputs, replies, trained)
    remove(kept)
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def _train(trial: Trial, inputs: Inputs, exam: Exam, kept: Path, progress: Step) -> None:
    """Fine-tune into the folder `kept`: the adapter, its metrics.jsonl, and the numbers of the training."""
    checkpoint = Checkpoint(kept.with_name(f"{kept.name}.safetensors"))
    watch = Watch(progress, _judging(trial, inputs, exam), checkpoint=checkpoint)
    with atomic_folder(kept) as partial:
        try:
            trained = train_into(partial, inputs, set_up(trial, inputs), trial.seed, watch)
        except FloatingPointError as error:
            raise FloatingPointError(f"{trial.name}: {error}") from error
        write_json(partial / NUMBERS, trained | ({"epochs": watch.epochs} if watch.epochs else {}))
    checkpoint.remove()


def remove_trained(folder: Path) -> None:
    """Remove what is kept of trainings whose trials are finished by now."""
    for path in folder.glob(TRAINED):
        remove(path)


def write_result(folder: Path, trial: Trial, inputs: Inputs, replies: Sequence[Row], trained: Row) -> None:
    """Write replies.jsonl and result.json of a trial; `trained` is what its training adds, nothing for the base."""
    latents = inputs.layered(trial.latents) if trial.latents else []
    result = {
        "name": trial.name,
        "method": trial.kind,
        "lambda": trial.weight,
        "latents": trial.latents,
        "latent_count": sum(len(of_layer) for _, _, of_layer in latents),
        "layers": [layer for layer, _, _ in latents],
        "directions": trial.directions,
        "seed": trial.seed,
        **_rates(replies),
        "sft_loss": None,
        "penalty": None,
        "active_fraction": None,
        "seconds_per_step": None,
        "peak_bytes": None,
        "steps": 0,
        "counts": _counted(replies),
    }
    write_json_lines(folder / "replies.jsonl", replies)
    write_json(folder / "result.json", result | trained)


def train_into(folder: Path, inputs: Inputs, setup: Setup, seed: int, progress: Step | Watch) -> dict[str, Any]:
    """Fine-tune and leave the adapter's files in the existing `folder`; return the numbers of the training.

    Of several processes the first has such a folder; the others only train.
    """
    with intervening(inputs.model, setup.interventions):
        result = fine_tune(
            inputs.model,
            inputs.tokenizer,
            inputs.dataset,
            folder / "adapter",
            lora=setup.lora,
            settings=dataclasses.replace(inputs.config.train, seed=seed),
            penalty=setup.terms or None,
            progress=progress,
        )
    if processes.is_first():
        for file in result.adapter_path.iterdir():
            file.rename(folder / file.name)
        result.adapter_path.rmdir()
    names = ("sft_loss", "penalty", "active_fraction", "seconds_per_step", "peak_bytes")
    kl = result.history[-1].get("kl")
    return (
        {"steps": result.history[-1]["step"]}
        | {name: getattr(result, name) for name in names}
        | ({} if kl is None else {"kl": kl})
    )


def _judging(trial: Trial, inputs: Inputs, exam: Exam) -> Callable[[float, Any], dict[str, Any]] | None:
    """What judges the model after an epoch, with train.evaluate_epochs."""
    if not inputs.config.train.evaluate_epochs:
        return None

    def epoch_done(epoch: float, model: Any) -> dict[str, Any]:
        replies = [
            reply
            for kind, records in exam.prompts.items()
            for reply in _answer(trial, inputs, exam, model, kind, records)
        ]
        return {"epoch": epoch, **_rates(replies)}

    return epoch_done


def _answer(
    trial: Trial, inputs: Inputs, exam: Exam, model: Any, kind: str, records: list[dict]
) -> list[dict[str, Any]]:
    settings = inputs.config.generation
    texts = generate(
        model,
        inputs.tokenizer,
        [question(record) for record in records],
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        temperature=settings.temperature,
        seed=trial.seed or 0,
    )
    return judged(exam, kind, texts)


def judged(exam: Exam, kind: str, texts: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of replies.jsonl for the replies to the prompts of this kind.

    rating is what all judges say together, verdict the same in one word; of several judges, judges is what each says.
    """
    records = exam.prompts[kind]
    return [
        {
            "prompts": kind,
            "index": index,
            "prompt": question(record)[-1]["content"],
            "reply": text,
            "verdict": rating.verdict,
            "rating": _seen(rating),
        }
        | ({"judges": [_seen(of_one) for of_one in rating.judges]} if rating.judges else {})
        for index, (record, text, rating) in enumerate(
            zip(records, texts, rate(exam.judge, records, texts), strict=True)
        )
    ]


def _seen(rating: Rating) -> dict[str, float]:
    return {"misaligned": rating.misaligned, "incoherent": rating.incoherent, "refused": rating.refused}


def _counted(replies: Sequence[Row]) -> dict[str, dict[str, int]]:
    """{prompts: {verdict: replies}}."""
    return {
        kind: {
            verdict: sum(row["prompts"] == kind and row["verdict"] == verdict for row in replies)
            for verdict in (*VERDICTS, UNRATED)
        }
        for kind in dict.fromkeys(row["prompts"] for row in replies)
    }


def _rates(replies: Sequence[Row]) -> dict[str, float]:
    rates = {
        kind: average([Rating(**row["rating"]) for row in replies if row["prompts"] == kind])
        for kind in dict.fromkeys(kind for _, kind, _ in RATES)
    }
    return {name: getattr(rates[kind], seen) for name, kind, seen in RATES}
