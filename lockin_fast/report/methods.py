"""The picture that compares methods: misalignment removed against what it costs in the learned task."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lockin_fast.report.style import INK, looks, name_cost, percent_axis, save_figure
from lockin_fast.sweep.summary import is_blocked, method_name

Summary = Mapping[str, Any]


def draw_methods(summary: Summary, folder: Path) -> list[Path]:
    """Write methods.png into `folder` and return its path in a list; an empty one where nothing but blocking was tried.

    The axes are the paper's: dEM = (EM0 - EM) / EM0 upwards, dAd = (Ad - Ad0) / Ad0 to the right, against fine-tuning
    without blocking. A line is one method, or one latent set, in the order of its strength.
    """
    families: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(summary["means"], key=lambda row: (not is_blocked(row), row["lambda"])):
        families.setdefault(row["latents"] if is_blocked(row) else method_name(row), []).append(row)
    if all(is_blocked(row) for row in summary["means"]) or not summary["baseline"]["em"]:
        return []
    height = max(5.6, 0.5 + 0.235 * (len(families) + 1))  # the legend's lines
    return [save_figure(folder / "methods.png", (10.4, height), lambda figure: _draw(figure, summary, families))]


def _draw(figure: Any, summary: Summary, families: Mapping[str, list[Mapping[str, Any]]]) -> None:
    axes = figure.subplots()
    before, limits = summary["baseline"]["in_domain"], summary["limits"]
    chosen = looks(families)
    for name, look in zip(families, chosen.values(), strict=True):
        rows = families[name]
        x = [row["in_domain"] / before - 1 if before else 0.0 for row in rows]
        y = [row["em_reduction"] for row in rows]
        axes.plot(x, y, color=look.color, linewidth=1.3, alpha=0.45, zorder=2)
        for i, (row, place) in enumerate(zip(rows, zip(x, y, strict=True), strict=True)):
            coherent = row["incoherence_change"] <= limits["incoherence_rise"]
            axes.scatter(
                *place,
                s=70 if len(rows) == 1 else 40 + 60 * i / (len(rows) - 1),
                marker=look.marker,
                facecolor=look.color if coherent else "white",
                edgecolor="white" if coherent else look.color,
                linewidth=1.0 if coherent else 1.6,
                zorder=3,
            )
        label = f"blocking {name}" if is_blocked(rows[0]) else name
        axes.plot([], [], color=look.color, marker=look.marker, linestyle="", markersize=8, label=label)
    axes.scatter([0], [0], s=70, color=INK, marker="D", zorder=4, edgecolor="white", label="no blocking")
    if before:
        edge = -limits["in_domain_drop"] / before
        left, right = axes.get_xlim()
        axes.set_xlim(min(left, 1.6 * edge), right)
        name_cost(axes, edge, "task down by more\nthan 2 points")
    axes.set_xlabel("change of in-domain  ΔAd = (Ad − Ad₀) / Ad₀")
    axes.set_ylabel("misalignment removed  ΔEM = (EM₀ − EM) / EM₀")
    axes.set_title("What each method removes, and what it costs the task")
    axes.tick_params(length=0)
    percent_axis(axes.xaxis, signed=True)
    percent_axis(axes.yaxis)
    figure.legend(loc="outside right upper", frameon=False, labelcolor="linecolor", handletextpad=0.2, fontsize=11)
