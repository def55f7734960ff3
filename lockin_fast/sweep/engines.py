"""Who runs the missing trials of a sweep: this process, one batch of trials after the other, or a Ray cluster."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockin_fast.exam import Exam
from lockin_fast.inputs import Inputs
from lockin_fast.progress import Progress
from lockin_fast.provenance import kernels
from lockin_fast.rundir import RunError
from lockin_fast.sweep.plan import Trial
from lockin_fast.sweep.stack import run_stack, stored_stack
from lockin_fast.sweep.trial import Step, run_trial

SHOWN_FAILURES = 3


class TrialsFailed(RunError):
    """Some trials of a sweep failed; it is raised when all the others are finished."""


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


def batches(trials: Sequence[Trial], folder: Path, stacks: Sequence[tuple[Trial, ...]] = ()) -> list[Batch]:
    """The trials that have no folder below `folder` yet, in their order and grouped into what runs as one.

    stacks: those that train together. They are the same whatever is finished, so that a killed sweep goes on with the
    stacks it had.
    """
    stacked = {trial for stack in stacks for trial in stack}
    groups = [*stacks, *((trial,) for trial in trials if trial not in stacked)]
    groups.sort(key=lambda group: trials.index(group[0]))
    made, last = [], 0
    for group in groups:
        first, last = last + 1, last + len(group)
        number, what = (f"{last}", group[0].name) if len(group) == 1 else (f"{first}-{last}", f"{len(group)} adapters")
        batch = Batch(f"[{number}/{len(trials)}] {what}", group, tuple(folder / trial.name for trial in group))
        made.append(batch.unfinished())
    return [batch for batch in made if batch is not None]


def run_batch(batch: Batch, inputs: Inputs, exam: Exam, progress: Step) -> None:
    """Run the trials of `batch`; each folder appears whole or not at all. Raises as `run_trial`."""
    if len(batch.trials) > 1 or stored_stack(batch.trials, batch.folders):
        run_stack(batch.trials, inputs, exam, batch.folders, progress)
    else:
        run_trial(batch.trials[0], inputs, exam, batch.folders[0], progress)


def in_process(missing: Sequence[Batch], inputs: Inputs, exam: Exam, progress: Progress) -> dict[str, Any]:
    """Run the batches here, one after the other. Returns what served (see `kernels`).

    Raises TrialsFailed, when all the others have run, for trials that diverged; any other error ends it at once.
    """
    failures = []
    for batch in missing:
        progress(batch.stage, 0, 0)
        try:
            run_batch(batch, inputs, exam, lambda done, total, stage=batch.stage: progress(stage, done, total))
        except FloatingPointError as error:
            failures.append((batch, str(error)))
    if failures:
        raise trials_failed(failures, sum(len(batch.trials) for batch in missing))
    return kernels()


def trials_failed(failures: Sequence[tuple[Batch, str]], total: int) -> TrialsFailed:
    """The error, in one line, for batches that failed and why, of `total` trials that were to run."""
    lines = []
    for batch, cause in failures[:SHOWN_FAILURES]:
        names, line = [trial.name for trial in batch.trials], " ".join(cause.split())
        lines.append(line if line.startswith(tuple(names)) else f"{', '.join(names)}: {line}")
    failed = sum(not folder.is_dir() for batch, _ in failures for folder in batch.folders)
    more = f"; and {len(failures) - SHOWN_FAILURES} more" if len(failures) > SHOWN_FAILURES else ""
    return TrialsFailed(f"{failed} of {total} trials failed, the others are finished: {'; '.join(lines)}{more}")
