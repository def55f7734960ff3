"""Several trials at once: their adapters train together, and answer the prompts together."""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lockin_fast.checkpoint import Checkpoint, after, stored_state
from lockin_fast.config import ConfigError
from lockin_fast.exam import Exam, question
from lockin_fast.inputs import Inputs
from lockin_fast.rundir import atomic_folder, write_json_lines
from lockin_fast.stacked import Member, StackResult, train_stack
from lockin_fast.stacked.generation import generate_stacked
from lockin_fast.stacked.size import adapters_of_a_stack
from lockin_fast.stacked.stack import check_stackable, exporting
from lockin_fast.sweep.methods import set_up, stackable
from lockin_fast.sweep.plan import Trial
from lockin_fast.sweep.trial import Step, judged, write_result

STORED = ".stack-*.safetensors"  # beside the trials' folders: the state of stacks that are not finished


def stack_size(inputs: Inputs) -> int:
    """How many adapters train together: sweep.stack, or what it leaves open.

    Raises ConfigError where several are asked for and the model or the settings do not allow it.
    """
    config = inputs.config
    asked = config.sweep.stack
    if asked == 1 or (asked is None and config.sweep.engine == "ray"):
        return 1
    try:
        if config.quantization == "int8":
            raise ValueError("quantization: int8 treats a column by all rows of a batch, also of other adapters")
        check_stackable(inputs.model, config.lora)
    except ValueError as error:
        if asked is None:
            return 1
        raise ConfigError(f"sweep.stack: got {asked}, but {error}") from error
    longest = max(len(row["input_ids"]) for row in inputs.dataset)
    return asked or adapters_of_a_stack(inputs.model, longest, config.train)


def stacks(trials: Sequence[Trial], inputs: Inputs) -> list[tuple[Trial, ...]]:
    """Those of the trials that train together, two or more at a time.

    Those of one seed are beside each other, since they share their batches.

    Raises ConfigError as `stack_size`.
    """
    size = stack_size(inputs)
    able = sorted((trial for trial in trials if stackable(trial, inputs.config)), key=lambda trial: trial.seed)
    made = [tuple(able[start : start + size]) for start in range(0, len(able), size)]
    return [stack for stack in made if len(stack) > 1]


def run_stack(trials: Sequence[Trial], inputs: Inputs, exam: Exam, folders: Sequence[Path], progress: Step) -> None:
    """Run all the trials as one stack, and write for each the folder that `run_trial` would write.

    The state of the stack is kept beside the folders (see `Checkpoint`) and removed with the last of them: a killed run
    goes on from there. `progress(done, total)` counts optimiser steps, then replies.
    Raises RunError when the disk is full, and FloatingPointError, when all the others are finished, for trials that
    diverged.
    """
    config, count = inputs.config, sum(map(len, exam.prompts.values()))
    setups = [set_up(trial, inputs) for trial in trials]
    members = [
        Member(trial.name, trial.seed, setup.terms, setup.lora) for trial, setup in zip(trials, setups, strict=True)
    ]
    checkpoint = Checkpoint(_state_file(trials, folders), source=stored_stack(trials, folders))
    asked = count * len(trials)
    result = train_stack(
        inputs.model, inputs.tokenizer, inputs.dataset, members,
        settings=config.train, checkpoint=checkpoint, progress=lambda step, total: progress(step, total + asked),
    )  # fmt: skip
    finished = [n for n, member in enumerate(result.members) if member.failure is None]
    steps = max(member.history[-1]["step"] for member in result.members)
    answering = [trials[n] for n in finished]
    rows = _answers(answering, result, inputs, exam, lambda done: progress(steps + done, steps + asked))
    with exporting(inputs.model, config.lora) as save:
        for n, adapter, replies in zip(finished, result.stack.weights, rows, strict=True):
            with atomic_folder(folders[n]) as partial:
                save(adapter, partial)
                write_json_lines(partial / "metrics.jsonl", result.members[n].history)
                write_result(partial, trials[n], inputs, replies, _numbers(result, n))
    checkpoint.remove()
    failures: dict[str, list[str]] = {}
    for trial, member in zip(trials, result.members, strict=True):
        if member.failure:
            failures.setdefault(member.failure, []).append(trial.name)
    if failures:
        raise FloatingPointError("; ".join(f"{', '.join(names)}: {failure}" for failure, names in failures.items()))


def _answers(trials, result: StackResult, inputs: Inputs, exam: Exam, answered) -> list[list[dict[str, Any]]]:
    """The rows of replies.jsonl of every trial."""
    settings, rows = inputs.config.generation, [[] for _ in trials]
    for kind, records in exam.prompts.items():
        texts = generate_stacked(
            result.stack,
            inputs.tokenizer,
            [question(record) for record in records],
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            temperature=settings.temperature,
            seeds=[trial.seed for trial in trials],
        )
        for own, replies in zip(rows, texts, strict=True):
            own += judged(exam, kind, replies)
        answered(sum(map(len, rows)))
    return rows


def _numbers(result: StackResult, n: int) -> Mapping[str, Any]:
    """What result.json says of the training of member n; of a step's time it takes its share."""
    last, count = result.members[n].history[-1], len(result.members)
    kl = {"kl": last["kl"]} if "kl" in last else {}
    return kl | {
        "steps": last["step"],
        "sft_loss": last["sft_loss"],
        "penalty": last.get("block_penalty"),
        "active_fraction": last.get("active_fraction"),
        "seconds_per_step": result.seconds_per_step / count,
        "peak_bytes": result.peak_bytes,
        "stack": count,
    }


def _state_file(trials: Sequence[Trial], folders: Sequence[Path]) -> Path:
    names = hashlib.sha256("\n".join(trial.name for trial in trials).encode()).hexdigest()[:16]
    return folders[0].parent / STORED.replace("*", names)


def stored_stack(trials: Sequence[Trial], folders: Sequence[Path]) -> Path | None:
    """The state file of a stack that holds all of these trials, the stack of just them first."""
    wanted, own = {trial.name for trial in trials}, _state_file(trials, folders)
    others = {after(path) for path in own.parent.glob(f"{STORED}*")} - {own}
    for path in (own, *sorted(others)):
        state = stored_state(path)
        if wanted <= {member["name"] for member in state.get("members", ())}:
            return path
        if not state and path != own:  # reading its own state says so itself
            warnings.warn(f"{path} is damaged; the trials in it start from their beginning", stacklevel=2)
    return None


def remove_stored(folder: Path) -> None:
    """Remove the states of stacks whose trials are all finished by now."""
    for path in folder.glob(f"{STORED}*"):
        path.unlink()
