"""What a measurement keeps while it runs: replies as they are made, the metrics of a checkpoint when it is done."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lockin_fast.discovery.kept import AppendedLines
from lockin_fast.judges.rating import NO_RATING, Rating

RATES = ("misaligned", "incoherent", "refused")


class RepliesKept(AppendedLines):
    """Replies, and what the judge sees in them.

    A line is {"step", "prompts", "prompt"}, the checkpoint's step, the name of a set of prompts and the index of one
    among those of it that are used, with either "reply" or the three rates, null where no judge gave a rating.
    """

    WHAT, REMEDY = "a reply or a rating", "made again"

    def __init__(self, path: Path):
        self.replies: dict[tuple[int, str, int], str] = {}
        self.ratings: dict[tuple[int, str, int], Rating] = {}
        super().__init__(path)

    def keep_replies(self, step: int, prompts: str, replies: Mapping[int, str]) -> None:
        """Write the replies to prompts of these indices."""
        self.add([{"step": step, "prompts": prompts, "prompt": i, "reply": text} for i, text in replies.items()])

    def keep_ratings(self, step: int, prompts: str, ratings: Mapping[int, Rating]) -> None:
        """Write the ratings of the replies to prompts of these indices."""
        self.add(
            [
                {"step": step, "prompts": prompts, "prompt": i}
                | {name: getattr(rating, name) if rating.rated else None for name in RATES}
                for i, rating in ratings.items()
            ]
        )

    def _know(self, row: Mapping[str, Any]) -> None:
        key = row["step"], row["prompts"], row["prompt"]
        if "reply" in row:
            self.replies[key] = row["reply"]
        else:
            rates = [row[name] for name in RATES]
            self.ratings[key] = NO_RATING if None in rates else Rating(*rates)


class Measurements(AppendedLines):
    """The metrics of every checkpoint, known by its step.

    A line is {"step", "checkpoint", "metrics": {name: value}, "details"}; a value is null where the evaluation failed,
    and details["failed"] then says why. details["previous"] is the step that relative metrics compare it with. More
    metrics of a step that is there already are a line of their own.
    """

    WHAT, REMEDY = "a measured checkpoint", "measured again"

    def __init__(self, path: Path):
        self.metrics: dict[int, dict[str, float | None]] = {}
        self.failed: dict[int, dict[str, str]] = {}
        self.previous: dict[int, dict[str, int | None]] = {}
        super().__init__(path)

    def missing(self, step: int, previous: int | None, names: Sequence[str], relative: Sequence[str]) -> list[str]:
        """The names of metrics that are not known of this step; of relative ones, not compared with this `previous`."""
        known = self.metrics.get(step, {})
        return [
            name
            for name in names
            if name not in known or (name in relative and self.previous[step][name] != previous)
        ]

    def series(self, steps: Sequence[int], name: str) -> list[float | None]:
        """The values of one metric over steps, all of which are there."""
        return [self.metrics[step][name] for step in steps]

    def _know(self, row: Mapping[str, Any]) -> None:
        step, metrics, details = row["step"], row["metrics"], row["details"]
        failed = self.failed.setdefault(step, {})
        for name in metrics:
            failed.pop(name, None)
        failed.update(details["failed"])
        self.metrics.setdefault(step, {}).update(metrics)
        self.previous.setdefault(step, {}).update(dict.fromkeys(metrics, details["previous"]))
