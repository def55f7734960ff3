"""What was measured over checkpoints, for the terminal and the report."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lockin_fast.rundir import RunError

FILE = "lockin.json"
ONSET_HEADINGS = ("metric", "onset", "after", "not after", "why")
TRIGGER_HEADINGS = ("trigger", "says", "why")
SAID = {"supported": "fires", "not supported": "clear", "cannot say": "undecided"}  # of a trigger
CAPTION = (
    "Every metric against the step, on an axis that is linear up to step 1 and logarithmic beyond. A line marks the "
    "onset, the band the interval in which it lies; series without either have no onset that was found. Gaps are "
    "evaluations that failed."
)
Measured = Mapping[str, Any]  # what lockin.json holds
SUPPORTED = "supported"


def table(found: Measured) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: a checkpoint each, its step, its name and every metric, a dash where the evaluation failed."""
    names = list(found["series"])
    columns = [found["series"][name]["values"] for name in names]
    rows = [
        [str(one["step"]), one["checkpoint"], *("–" if value is None else f"{value:.3f}" for value in values)]
        for one, *values in zip(found["checkpoints"], *columns, strict=True)
    ]
    return ["step", "checkpoint", *names], rows


def failures(found: Measured) -> list[str]:
    """A line for every evaluation that failed, and why."""
    return [
        f"step {one['step']}: {name} failed: {why}"
        for one in found["checkpoints"]
        for name, why in one["failed"].items()
        if name in found["series"]
    ]


def onsets(found: Measured) -> list[str]:
    """A line for each series: when it changed, with the interval, or why no change is told."""
    return [f"{name}: {_onset(series['onset'])}" for name, series in found["series"].items()]


def _onset(onset: Mapping[str, Any]) -> str:
    if onset["verdict"] != SUPPORTED:
        return f"no onset, {onset['verdict']}: {onset['why']}"
    after, until = onset["interval"]
    return f"onset at step {onset['step']:g}, after {after:g} and not after {until:g}: {onset['why']}"


def verdicts(found: Measured) -> Sequence[str]:
    """A line for each trigger."""
    return [f"trigger {one['name']}: {SAID[one['verdict']]}" for one in found["triggers"]]


def read_lockin(run: Path) -> dict[str, Any] | None:
    """What `lockin-fast measure` left in `run`; None where it left nothing. Raises RunError for anything else there."""
    if not (run / FILE).exists():
        return None
    try:
        found = json.loads((run / FILE).read_text(encoding="utf-8"))
        headline(found), table(found), failures(found), onset_rows(found), trigger_rows(found), found["anomalies"]
        return found
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{run / FILE}: not what measure writes ({error!r}); run measure again") from error


def headline(found: Measured) -> str:
    """In which series an onset was found, in a sentence, and what is odd about the run."""
    supported = {name: one["onset"] for name, one in found["series"].items() if one["onset"]["verdict"] == SUPPORTED}
    steps = ", ".join(f"{name} at step {onset['step']:g}" for name, onset in supported.items())
    told = f"Onset of {steps}." if steps else f"No onset was found in {len(found['series'])} series."
    return " ".join([told, *(f"Beware: {anomaly}." for anomaly in found["anomalies"])])


def onset_rows(found: Measured) -> list[list[str]]:
    """A row for each series: when it changed, the interval, and why, or why not."""
    rows = []
    for name, one in found["series"].items():
        onset = one["onset"]
        if onset["verdict"] == SUPPORTED:
            rows.append([name, *(f"{step:g}" for step in (onset["step"], *onset["interval"])), onset["why"]])
        else:
            rows.append([name, onset["verdict"], "", "", onset["why"]])
    return rows


def trigger_rows(found: Measured) -> list[list[str]]:
    """A row for each trigger: what it says, and why."""
    return [[one["name"], SAID[one["verdict"]], one["why"]] for one in found["triggers"]]
