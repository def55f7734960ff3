"""What was measured over checkpoints, for the terminal and the report."""

from collections.abc import Mapping, Sequence
from typing import Any

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
    said = {SUPPORTED: "fires", "not supported": "clear", "cannot say": "undecided"}
    return [f"trigger {one['name']}: {said[one['verdict']]}" for one in found["triggers"]]
