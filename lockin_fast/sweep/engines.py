"""Who runs the missing trials of a sweep: this process, one batch of trials after the other, or a Ray cluster."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockin_fast.inputs import Exam, Inputs
from lockin_fast.progress import Progress
from lockin_fast.provenance import kernels
from lockin_fast.sweep.trial import Step, Trial, run_trial


@dataclass(frozen=True)
class Batch:
    """Missing trials that run as one: `stage` is what the progress shows of them, `folders` where each one ends up."""

    stage: str
    trials: tuple[Trial, ...]
    folders: tuple[Path, ...]

    def unfinished(self) -> "Batch | None":
        """The part of the batch that has no folder yet, None when there is none."""
        pairs = zip(self.trials, self.folders, strict=True)
        if rest := [(trial, folder) for trial, folder in pairs if not folder.is_dir()]:
            return Batch(self.stage, *zip(*rest, strict=True))
        return None


def batches(trials: Sequence[Trial], folder: Path) -> list[Batch]:
    """The trials that have no folder below `folder` yet, in their order and grouped into what runs as one."""
    return [
        Batch(f"[{number}/{len(trials)}] {trial.name}", (trial,), (folder / trial.name,))
        for number, trial in enumerate(trials, 1)
        if not (folder / trial.name).is_dir()
    ]


def run_batch(batch: Batch, inputs: Inputs, exam: Exam, progress: Step) -> None:
    """Run the trials of `batch`; each folder appears whole or not at all. Raises as `run_trial`."""
    (trial,), (folder,) = batch.trials, batch.folders
    run_trial(trial, inputs, exam, folder, progress)


def in_process(missing: Sequence[Batch], inputs: Inputs, exam: Exam, progress: Progress) -> dict[str, Any]:
    """Run the batches here, one after the other; the first that fails ends it. Returns what served (see `kernels`)."""
    for batch in missing:
        progress(batch.stage, 0, 0)
        run_batch(batch, inputs, exam, lambda done, total, stage=batch.stage: progress(stage, done, total))
    return kernels()
