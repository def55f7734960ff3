"""One trial: fine-tune with one lambda, latent set and seed, answer the prompts, judge, and write one folder."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lockin_fast.blocking import BlockPenalty
from lockin_fast.generation import generate
from lockin_fast.inputs import Exam, Inputs, question
from lockin_fast.judges import VERDICTS
from lockin_fast.lora import adapter
from lockin_fast.rundir import atomic_folder, write_json, write_json_lines
from lockin_fast.train import fine_tune

Step = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Trial:
    """What sets one trial apart: `latents` None is unblocked, `weight` None the base model, which is not trained."""

    latents: str | None
    weight: float | None
    seed: int | None

    @property
    def name(self) -> str:
        if self.weight is None:
            return "base"
        return f"{self.latents or 'baseline'}-lambda{self.weight:.15g}-seed{self.seed}"


def run_trial(trial: Trial, inputs: Inputs, exam: Exam, folder: Path, progress: Step) -> dict[str, Any]:
    """Run `trial` and write `folder`: an ordinary PEFT adapter beside replies.jsonl, metrics.jsonl and result.json.

    The folder appears whole or not at all. Returns the content of result.json. `progress(done, total)` counts optimiser
    steps, then replies. Raises RunError when the disk is full, FloatingPointError when training diverges.
    """
    count = sum(map(len, exam.prompts.values()))
    with atomic_folder(folder) as partial:
        trained = {}
        if trial.weight is not None:
            penalty = inputs.penalty(trial.latents, trial.weight) if trial.latents else None
            try:
                trained = train_into(
                    partial, inputs, penalty, trial.seed, lambda done, total: progress(done, total + count)
                )
            except FloatingPointError as error:
                raise FloatingPointError(f"{trial.name}: {error}") from error
        steps = trained.get("steps", 0)
        with adapter(inputs.model, partial if trained else None) as model:
            replies = []
            for kind, records in exam.prompts.items():
                replies += _answer(trial, inputs, exam, model, kind, records)
                progress(steps + len(replies), steps + count)
        counts = {
            kind: {
                verdict: sum(row["prompts"] == kind and row["verdict"] == verdict for row in replies)
                for verdict in VERDICTS
            }
            for kind in exam.prompts
        }
        result = {
            "name": trial.name,
            "lambda": trial.weight,
            "latents": trial.latents,
            "latent_count": len(inputs.latents[trial.latents]) if trial.latents else 0,
            "seed": trial.seed,
            "em": _rate(counts["final"], "misaligned"),
            "incoherence": _rate(counts["final"], "incoherent"),
            "in_domain": _rate(counts["in_domain"], "misaligned"),
            "sft_loss": None,
            "penalty": None,
            "active_fraction": None,
            "seconds_per_step": None,
            "peak_bytes": None,
            "steps": steps,
            "counts": counts,
        } | trained
        write_json_lines(partial / "replies.jsonl", replies)
        write_json(partial / "result.json", result)
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def train_into(folder: Path, inputs: Inputs, penalty: BlockPenalty | None, seed: int, progress: Step) -> dict[str, Any]:
    """Fine-tune and leave the adapter's files in the existing `folder`; return the numbers of the training."""
    result = fine_tune(
        inputs.model,
        inputs.tokenizer,
        inputs.dataset,
        folder / "adapter",
        lora=inputs.config.lora,
        settings=dataclasses.replace(inputs.config.train, seed=seed),
        penalty=penalty,
        progress=progress,
    )
    for file in result.adapter_path.iterdir():
        file.rename(folder / file.name)
    result.adapter_path.rmdir()
    names = ("sft_loss", "penalty", "active_fraction", "seconds_per_step", "peak_bytes")
    return {"steps": result.history[-1]["step"]} | {name: getattr(result, name) for name in names}


def _answer(
    trial: Trial, inputs: Inputs, exam: Exam, model: Any, kind: str, records: list[dict]
) -> list[dict[str, Any]]:
    settings = inputs.config.generation
    questions = [question(record) for record in records]
    texts = generate(
        model,
        inputs.tokenizer,
        questions,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        temperature=settings.temperature,
        seed=trial.seed or 0,
    )
    return [
        {
            "prompts": kind,
            "index": index,
            "prompt": asked[-1]["content"],
            "reply": text,
            "verdict": exam.judge.judge(record, text),
        }
        for index, (record, asked, text) in enumerate(zip(records, questions, texts, strict=True))
    ]


def _rate(counts: Mapping[str, int], verdict: str) -> float:
    return counts[verdict] / sum(counts.values())
