"""One finished sweep beside others: does the effect hold on other organisms, or in other runs?"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lockin_fast.report.text import percent, points
from lockin_fast.rundir import RunError, write_json

FILE = "robustness.json"
# (group, its columns); EM is the rate of emergent misalignment
COLUMNS = (
    ("", ("run", "seeds")),
    ("no blocking", ("EM", "incoh.", "in-dom.")),
    ("causal latents at their best lambda", ("lambda", "EM", "cut by", "in-dom.", "incoh.")),
    ("best EM of", ("top-delta", "random")),
)
AVERAGED = (
    "em",
    "incoherence",
    "in_domain",
    "causal_em",
    "causal_reduction",
    "causal_in_domain_change",
    "causal_incoherence_change",
    "top_delta_em",
    "random_em",
)


def read_summary(run: Path) -> dict[str, Any]:
    """Return summary.json of the finished sweep in the folder `run`; RunError when that holds none."""
    file = run / "summary.json"
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{run}: no summary.json in it; give the output folder of a finished sweep") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(summary, dict) or not {"base", "baseline", "means", "best_per_set"} <= summary.keys():
        raise RunError(f"{file}: not the summary of a sweep; give the output folder of a finished sweep")
    return summary


def compare(run: Path, others: Sequence[Path]) -> dict[str, Any]:
    """Write robustness.json into `run`: {"run": row, "others": [row...], "average_of_others": row}; return it.

    A row holds rates in [0, 1]: em, incoherence and in_domain of unblocked fine-tuning; of the causal set at its best
    lambda (as `summarise` picks it) causal_lambda, causal_em, causal_reduction (relative) and its changes of in_domain
    and incoherence; and the em of top-delta and random at theirs. What a run did not sweep is null.
    Raises RunError, before anything is written, for a run that is no finished sweep or is named twice.
    """
    places = [path.resolve() for path in (run, *others)]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise RunError(f"{(run, *others)[i]}: named twice; give runs other than {run}, each once")
    own, *rows = [_row(path, read_summary(path)) for path in (run, *others)]
    return _written(run, own, rows)


def stored(run: Path) -> dict[str, Any] | None:
    """What an earlier `compare` found, brought up to date with `run`'s own summary; None if there was none."""
    file = run / FILE
    if not file.exists():
        return None
    try:
        others = json.loads(file.read_text(encoding="utf-8"))["others"]
        return _written(run, _row(run, read_summary(run)), others)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise RunError(f"{file}: cannot be read ({error!r}); remove it, or compare again") from error


def cells(comparison: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table: this run, the others, and the average of the others; texts, one for each of COLUMNS."""
    rows = [comparison["run"], *comparison["others"]]
    return [_cells(row) for row in [*rows, comparison["average_of_others"]]]


def verdict(comparison: Mapping[str, Any]) -> str:
    """The average of the others in a sentence."""
    average, count = comparison["average_of_others"], len(comparison["others"])
    if average["causal_reduction"] is None:
        return "The other runs did not sweep a set named causal, or nothing was misaligned in them."
    where = "In the other run" if count == 1 else f"On average over the {count} other runs"
    return (
        f"{where}, causal latents at their best lambda take misalignment from {percent(average['em'])} to "
        f"{percent(average['causal_em'])} (a cut of {percent(average['causal_reduction'])}), in-domain changes by "
        f"{points(average['causal_in_domain_change'])} and incoherence by "
        f"{points(average['causal_incoherence_change'])} points."
    )


def _written(run: Path, own: dict[str, Any], others: list[dict[str, Any]]) -> dict[str, Any]:
    comparison = {"run": own, "others": others, "average_of_others": _average(others)}
    write_json(run / FILE, comparison)
    return comparison


def _row(run: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    unblocked, best = summary["baseline"], summary["best_per_set"]
    causal = best.get("causal", {})
    return {
        "name": run.resolve().name,
        "organism": _organism(run),
        "seeds": unblocked["seeds"],
        "em": unblocked["em"],
        "incoherence": unblocked["incoherence"],
        "in_domain": unblocked["in_domain"],
        "causal_lambda": causal.get("lambda"),
        "causal_em": causal.get("em"),
        "causal_reduction": causal.get("em_reduction"),
        "causal_in_domain_change": causal.get("in_domain_change"),
        "causal_incoherence_change": causal.get("incoherence_change"),
        "top_delta_em": best.get("top-delta", {}).get("em"),
        "random_em": best.get("random", {}).get("em"),
    }


def _average(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over runs, each counting once however many seeds it has; over those that have the value."""
    average: dict[str, Any] = {"name": "mean of the others"}
    for key in AVERAGED:
        values = [row[key] for row in rows if row[key] is not None]
        average[key] = statistics.fmean(values) if values else None
    return average


def _organism(run: Path) -> int | None:
    """The seed of the organism that a demo grew; None for a run on another model."""
    try:
        return json.loads((run / "organism" / "organism.json").read_text(encoding="utf-8"))["seed"]
    except (OSError, ValueError, KeyError):
        return None


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    name, organism = row["name"], row.get("organism")
    weight, reduction = row.get("causal_lambda"), row["causal_reduction"]
    return (
        name if organism is None or name == f"organism{organism}" else f"{name}, organism {organism}",
        str(len(row["seeds"])) if "seeds" in row else "",
        *(percent(row[key]) for key in ("em", "incoherence", "in_domain")),
        "" if weight is None else f"{weight:,g}",
        percent(row["causal_em"]),
        percent(reduction),
        *(points(row[f"causal_{key}_change"]) for key in ("in_domain", "incoherence")),
        *(percent(row[f"{key}_em"]) for key in ("top_delta", "random")),
    )
