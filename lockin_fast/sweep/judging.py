"""What the judges of a sweep did: how many replies each rated, what that cost, and how far they agree."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lockin_fast.judges import Panel, Rating
from lockin_fast.judges.agreement import agreements
from lockin_fast.rundir import read_json_lines


def judging(panel: Panel, files: Sequence[Path]) -> dict[str, Any]:
    """The keys judges and agreement of summary.json, from the replies.jsonl of all finished trials.

    judges: {judge: replies, those that are unrated, and what is paid (see `Endpoint.cost`)}. agreement: for each pair
    of judges and verdict the counts, Cohen's kappa and its interval; empty with one judge.
    """
    names, rows = list(panel.raters), [row for file in files for row in read_json_lines(file)]
    of_row = [row["judges"] if len(names) > 1 else [row["rating"]] for row in rows]
    ratings = [[_rating(seen[i]) for seen in of_row] for i in range(len(names))]
    paid = panel.cost()
    judges = {
        name: {"replies": len(rows), "unrated": sum(not rating.rated for rating in of_judge)} | paid.get(name, {})
        for name, of_judge in zip(names, ratings, strict=True)
    }
    return {"judges": judges, "agreement": agreements(names, ratings)}


def _rating(seen: Mapping[str, float | None]) -> Rating:
    """The rating that a row of replies.jsonl holds, where NaN has become null."""
    return Rating(**{name: math.nan if share is None else share for name, share in seen.items()})
