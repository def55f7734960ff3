"""A sweep in words: its headline and the cells of its table, for the terminal and the HTML report alike."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lockin_fast.sweep.summary import is_blocked, method_name

Summary = Mapping[str, Any]
HEADINGS = ("latents", "lambda", "misaligned", "change", "in-domain", "incoherent", "refused", "penalty", "s/step")
SHOWN_MISSING = 3


class TableRow(NamedTuple):
    """One setting: its texts, one for each of HEADINGS, the numbers they sort by, and whether it is the best one."""

    cells: tuple[str, ...]
    keys: tuple[float | str, ...]
    best: bool


def headline(summary: Summary) -> str:
    """How much misalignment the best setting removes and what it costs, and which trials that is without."""
    missing = summary.get("missing", [])
    if not missing:
        return _verdict(summary)
    more = f" and {len(missing) - SHOWN_MISSING} more" if len(missing) > SHOWN_MISSING else ""
    return f"{_verdict(summary)} Without trials that failed: {', '.join(missing[:SHOWN_MISSING])}{more}."


def _verdict(summary: Summary) -> str:
    unblocked, best = summary["baseline"], summary["best"]
    if unblocked["em"] == 0:
        return "Fine-tuning without blocking made nothing misaligned here, so there is nothing to prevent."
    rates = f"unblocked fine-tuning answers {percent(unblocked['em'])} of the final prompts in a misaligned way"
    if not best:
        return (
            f"No setting kept in-domain and incoherence within 2 points of the baseline; {rates}. "
            "Try other lambdas or latents."
        )
    if best["em"] >= unblocked["em"]:
        return f"No latent set that keeps in-domain and coherence lowers misalignment here: {rates}."
    return (
        f"Blocking {best['latent_count']} {best['latents']} latents at lambda {best['lambda']:,g} cuts emergent "
        f"misalignment from {percent(unblocked['em'])} to {percent(best['em'])} "
        f"({signed_percent(-best['em_reduction'])}); in-domain {_moves(unblocked['in_domain'], best['in_domain'])}, "
        f"incoherence {_moves(unblocked['incoherence'], best['incoherence'])}{_over_seeds(len(best['seeds']))}."
    )


def table(summary: Summary) -> list[TableRow]:
    """The base model, the unblocked baseline, then every setting in the order it was run; means over seeds."""
    best = summary["best"]
    rows = [_row(summary["base"], "base model"), _row(summary["baseline"], "no blocking")]
    return rows + [
        _row(
            row,
            row["latents"] if is_blocked(row) else method_name(row),
            best=bool(best) and setting(row) == setting(best),
        )
        for row in summary["means"]
    ]


def percent(value: float | None, spread: float | None = None) -> str:
    """0.123 as 12.3%, with ± the spread when there is one."""
    if value is None:
        return "–"
    return f"{100 * value:.1f}%" if spread is None else f"{100 * value:.1f} ± {100 * spread:.1f}%"


def signed_percent(value: float) -> str:
    """-0.987 as −98.7%, with a real minus sign; what rounds to zero has none."""
    text = f"{100 * value:+.1f}%"
    return "0.0%" if text[1:] == "0.0%" else text.replace("-", "−")


def points(change: float | None) -> str:
    """A change of a rate in percentage points: 0.0123 as +1.2, with a real minus sign."""
    return "–" if change is None else signed_percent(change)[:-1]


def _row(row: Mapping[str, Any], name: str, *, best: bool = False) -> TableRow:
    change, penalty, seconds = row.get("em_reduction"), row["penalty"], row["seconds_per_step"]
    cells = (
        f"{name} ({row['latent_count']})" if row["latents"] else name,
        "–" if row["lambda"] is None or row.get("method") == "ablation" else f"{row['lambda']:,g}",
        *(percent(row["em"], row.get("em_std")), "–" if change is None else signed_percent(-change)),
        *(percent(row.get(key), row.get(f"{key}_std")) for key in ("in_domain", "incoherence", "refusal")),
        *("–" if value is None else f"{value:.3g}" for value in (penalty, seconds)),
    )
    numbers = (
        row["lambda"],
        row["em"],
        None if change is None else -change,
        row["in_domain"],
        row["incoherence"],
        row.get("refusal"),
        penalty,
        seconds,
    )
    return TableRow(cells, (cells[0], *(float("-inf") if n is None else n for n in numbers)), best)


def setting(row: Mapping[str, Any]) -> tuple:
    """What rows of several seeds have in common."""
    return row.get("method", "block"), row["latents"], row.get("directions"), row["lambda"]


def _moves(before: float, after: float) -> str:
    if percent(before) == percent(after):
        return f"stays at {percent(after)}"
    return f"goes from {percent(before)} to {percent(after)}"


def _over_seeds(count: int) -> str:
    return f" (means over {count} seeds)" if count > 1 else ""
