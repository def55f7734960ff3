"""The judges of a sweep in words: how far they agree, what they cost, what they left unrated."""

from collections.abc import Mapping
from typing import Any

from lockin_fast.report.text import percent

Summary = Mapping[str, Any]
HEADINGS = ("judges", "verdict", "both", "first alone", "second alone", "neither", "agree", "kappa", "95% interval")


def lines(summary: Summary) -> list[str]:
    """A sentence for every pair of judges, every judge that is paid, and every one that left replies unrated."""
    told = []
    pairs: dict[tuple, list[str]] = {}
    for row in summary.get("agreement", ()):
        pairs.setdefault(tuple(row["judges"]), []).append(f"{row['verdict']} {_kappa(row)}")
    for (first, second), kappas in pairs.items():
        told.append(f"agreement of {first} and {second}, Cohen's kappa: {'; '.join(kappas)}")
    for name, judge in summary.get("judges", {}).items():
        if "requests" in judge:
            cost = f", cost {judge['cost']:,.2f}" if judge["cost"] else ""
            told.append(
                f"{name}: {judge['requests']:,} requests paid for, {judge['tokens_in']:,} tokens in and "
                f"{judge['tokens_out']:,} out{cost}"
            )
        if judge["unrated"]:
            told.append(f"{name}: {judge['unrated']:,} of {judge['replies']:,} replies unrated, left out of the rates")
    return told


def rows(summary: Summary) -> list[tuple[str, ...]]:
    """The cells of the table of agreement, one row for each pair of judges and verdict."""
    counts = ("both", "first", "second", "neither")
    return [
        (
            " and ".join(row["judges"]),
            row["verdict"],
            *(f"{row[name]:,}" for name in counts),
            percent(row["observed"]),
            _number(row["kappa"]),
            "–" if row["low"] is None else f"{_number(row['low'])} to {_number(row['high'])}",
        )
        for row in summary.get("agreement", ())
    ]


def _kappa(row: Mapping[str, Any]) -> str:
    if row["kappa"] is None:
        return "undefined (both say the same of every reply)"
    return f"{_number(row['kappa'])} ({_number(row['low'])} to {_number(row['high'])})"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".replace("-", "−")
