"""The pictures of a sweep: rates against lambda, and what less misalignment costs in the learned task."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lockin_fast.report.style import (
    INK,
    WARN,
    Look,
    lambda_axis,
    looks,
    name_cost,
    offset_copy,
    percent_axis,
    save_figure,
    spread_apart,
)
from lockin_fast.sweep.summary import is_blocked

APART, APART_ALL = 11.0, 44.0  # printer's points in the trade-off: between the sets of one setting, and over them all
FEW = 8  # sets whose names have a line of their own for the number of latents
WIDTH = 10.4  # inches, of every figure
PANEL = 270  # printer's points, of a panel of the trade-off between its margins

Summary = Mapping[str, Any]


def draw_figures(summary: Summary, folder: Path) -> list[Path]:
    """Write sweep.png and trade_off.png of a sweep's blocked settings into `folder`; return their paths.

    Raises ImportError naming the extra to install when matplotlib is missing, ValueError when nothing was swept.
    """
    summary = blocked_alone(summary)
    if not summary["means"]:
        raise ValueError("summary: it holds no blocked trial, so there is nothing to draw")
    count = len(_looks(summary)) + 1
    legend_rows = -(-count // _legend_columns(summary))
    return [
        save_figure(folder / f"{name}.png", (WIDTH, height), lambda figure, draw=draw: draw(figure, summary))
        for name, height, draw in (
            ("sweep", 5.4 if count <= FEW + 1 else max(5.4, 1.2 + 0.24 * count), _draw_sweep),
            ("trade_off", 5.0 + 0.23 * max(legend_rows - 2, 0), _draw_trade_off),
        )
    ]


def blocked_alone(summary: Summary) -> Summary:
    """The summary without the competing methods."""
    return {**summary} | {key: [row for row in summary[key] if is_blocked(row)] for key in ("means", "trials")}


def _draw_sweep(figure: Any, summary: Summary) -> None:
    panels = figure.subplot_mosaic([["em", "in_domain"], ["em", "incoherence"]], width_ratios=[1.75, 1])
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, wspace=0.03, hspace=0.04)
    for key, title in (
        ("em", "Emergent misalignment"),
        ("in_domain", "Task learned (in-domain)"),
        ("incoherence", "Incoherent replies"),
    ):
        _draw_rate(panels[key], summary, key)
        panels[key].set_title(title)
    _name_lines(panels["em"], summary)
    panels["em"].set_xlabel("blocking strength λ")
    panels["incoherence"].set_xlabel("λ")
    panels["in_domain"].tick_params(axis="x", labelbottom=False)


def _draw_rate(axes: Any, summary: Summary, key: str) -> None:
    """One rate against lambda: a line per latent set with its range over seeds, the unblocked baseline dashed."""
    means, unblocked = summary["means"], summary["baseline"][key]
    lambda_axis(axes, [row["lambda"] for row in means])
    axes.axhline(unblocked, color=INK, linestyle=(0, (5, 3)), linewidth=1.4, zorder=2)
    for name, look in _looks(summary).items():
        rows = _of_set(summary, name)
        x = [row["lambda"] for row in rows]
        seeds = [[t[key] for t in summary["trials"] if t["latents"] == name and t["lambda"] == value] for value in x]
        if max(map(len, seeds)) > 1:
            axes.fill_between(
                x, [min(s) for s in seeds], [max(s) for s in seeds], color=look.color, alpha=0.13, linewidth=0
            )
        axes.plot(
            x,
            [row[key] for row in rows],
            color=look.color,
            marker=look.marker,
            markersize=6.5,
            linewidth=2.2,
            markeredgecolor="white",
            markeredgewidth=1.0,
            zorder=3 + (name == "causal"),
        )
    percent_axis(axes.yaxis)
    _set_range(axes, summary, key)


def _set_range(axes: Any, summary: Summary, key: str) -> None:
    """Misalignment from zero; the two costs on a scale on which the tolerated change is visible and shaded."""
    values = [row[key] for row in [*summary["trials"], *summary["baseline"]["trials"]]]
    unblocked, limits = summary["baseline"][key], summary["limits"]
    if key == "em":
        axes.set_ylim(-0.012, max(1.12 * max(values), 0.1))
        return
    if key == "in_domain":
        edge = unblocked - limits["in_domain_drop"]
        low, high = min([*values, unblocked - 0.05]), max([*values, unblocked])
        axes.axhspan(low - 1, edge, color=WARN, alpha=0.06, linewidth=0)
    else:
        edge = unblocked + limits["incoherence_rise"]
        low, high = 0.0, max([*values, unblocked + 0.05])
        axes.axhspan(edge, high + 1, color=WARN, alpha=0.06, linewidth=0)
    margin = 0.08 * (high - low)
    axes.set_ylim(low - margin, high + margin)
    axes.annotate(
        "a cost of over 2 points",
        (0.03, 0.04 if key == "in_domain" else 0.96),  # the far end of what is shaded, where few lines come
        xycoords="axes fraction",
        ha="left",
        fontsize=9.5,
        color=WARN,
        va="bottom" if key == "in_domain" else "top",
    )


def _name_lines(axes: Any, summary: Summary) -> None:
    """Names at the right end of the lines instead of a legend."""
    names = _looks(summary)
    ends = [_of_set(summary, name)[-1] for name in names]
    low, high = axes.get_ylim()
    unblocked = summary["baseline"]["em"]
    few = len(names) <= FEW
    between = "\n" if few else ", "
    labels = [*(f"{row['latents']}{between}{_count(row)}" for row in ends), "no blocking"]
    colors = [*(look.color for look in names.values()), INK]
    wanted = [*(row["em"] for row in ends), unblocked]
    gap = 0.105 if few else 0.95 / (len(labels) + 1)  # of the axis
    places = spread_apart(wanted, gap * (high - low), low + 0.04 * (high - low), high)
    for label, color, place in zip(labels, colors, places, strict=True):
        axes.annotate(
            label,
            (1.0, place),
            (8, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=11 if few else 9.5,
            linespacing=1.05,
            fontweight="bold",
            annotation_clip=False,
        )


def _draw_trade_off(figure: Any, summary: Summary) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    figure.get_layout_engine().set(wspace=0.06)
    limits, in_domain = summary["limits"], summary["baseline"]["in_domain"]
    edge = -limits["in_domain_drop"] / in_domain if in_domain else 0.0
    _draw_cost(left, summary, "in_domain", edge, "task down by more\nthan 2 points")
    _draw_cost(right, summary, "incoherence", limits["incoherence_rise"], "incoherence up by\nmore than 2 points")
    lowest = min([_removed(row, summary) for row in summary["means"]] + [0.0])
    left.set_ylim(lowest - 0.07 * (1 - lowest), 1.16)
    percent_axis(left.yaxis)
    left.set_title("What less misalignment costs the task …")
    right.set_title("… and coherence")
    left.set_xlabel("change of in-domain  ΔAd = (Ad − Ad₀) / Ad₀")
    right.set_xlabel("change of the share of incoherent replies")
    left.set_ylabel("misalignment removed  ΔEM = (EM₀ − EM) / EM₀")
    figure.legend(
        *left.get_legend_handles_labels(),
        loc="outside upper left",
        ncols=_legend_columns(summary),
        frameon=False,
        labelcolor="linecolor",
        handletextpad=0.1,
        columnspacing=1.4,
        fontsize=11,
    )


def _legend_columns(summary: Summary) -> int:
    """As many columns, four at most, as have room for the longest name."""
    longest = max(len(_label(row)) for row in summary["means"])
    return max(1, min(4, int(72 * WIDTH / (30 + 5.9 * longest))))  # marker and gap, letters of 11 points


def _label(row: Mapping[str, Any]) -> str:
    return f"{row['latents']}, {_count(row)}"


def _count(row: Mapping[str, Any]) -> str:
    return f"{row['latent_count']} latent{'s' * (row['latent_count'] != 1)}"


def _draw_cost(axes: Any, summary: Summary, key: str, edge: float, warning: str) -> None:
    """Misalignment removed against the change of `key`; beyond `edge` the cost is more than is tolerated."""
    points = {
        name: [(_cost(row, summary, key), _removed(row, summary)) for row in _of_set(summary, name)]
        for name in _looks(summary)
    }
    every = [x for of_set in points.values() for x, _ in of_set]
    slack = 0.2 * abs(edge) or 0.01
    low, high = min([*every, 1.6 * edge, -slack]), max([*every, 1.6 * edge, slack])
    apart = min(APART, APART_ALL / max(len(points) - 1, 1))
    margin = 0.07 + apart * (len(points) - 1) / 2 / PANEL
    axes.set_xlim(low - margin * (high - low), high + margin * (high - low))
    name_cost(axes, edge, warning)
    axes.scatter([0], [0], s=70, color=INK, marker="D", zorder=4, edgecolor="white", label="no blocking")
    for place, (name, look) in enumerate(_looks(summary).items()):
        aside = offset_copy(axes, apart * (place - (len(points) - 1) / 2))
        _draw_path(axes, points[name], _of_set(summary, name), look, aside)
        if summary["best"] and summary["best"]["latents"] == name:
            x, y = _cost(summary["best"], summary, key), _removed(summary["best"], summary)
            axes.plot([x], [y], marker="o", markersize=18, color="none", mec=INK, mew=1.6, zorder=6, transform=aside)
            if key == "in_domain":
                _name_best(axes, summary["best"], x, y)
    percent_axis(axes.xaxis, signed=True)
    axes.tick_params(length=0)
    axes.locator_params(axis="x", nbins=6)


def _name_best(axes: Any, best: Mapping[str, Any], x: float, y: float) -> None:
    side = -1 if x > sum(axes.get_xlim()) / 2 else 1
    axes.annotate(
        f"best: {best['latents']}, λ = {best['lambda']:,g}",
        (x, y),
        (0, 12),
        textcoords="offset points",
        ha="right" if side < 0 else "left",
        va="bottom",
        fontsize=11,
        fontweight="bold",
    )


def _draw_path(axes: Any, points: list[tuple[float, float]], rows: list[Mapping], look: Look, aside: Any) -> None:
    """The settings of one latent set in order of lambda; larger markers for larger lambda."""
    x, y = [point[0] for point in points], [point[1] for point in points]
    axes.plot(x, y, color=look.color, linewidth=1.3, alpha=0.45, zorder=2, transform=aside)
    sizes = [40 + 60 * i / max(len(rows) - 1, 1) for i in range(len(rows))]
    axes.scatter(
        x,
        y,
        s=sizes,
        color=look.color,
        marker=look.marker,
        edgecolor="white",
        linewidth=1.0,
        zorder=3,
        transform=aside,
        label=_label(rows[0]),
    )


def _cost(row: Mapping[str, Any], summary: Summary, key: str) -> float:
    """dAd, relative, or the change of incoherence in points, against the unblocked baseline."""
    before = summary["baseline"][key]
    if key == "incoherence":
        return row[key] - before
    return row[key] / before - 1 if before else 0.0


def _removed(row: Mapping[str, Any], summary: Summary) -> float:
    """dEM against the unblocked baseline; 0 where that leaves nothing to remove."""
    before = summary["baseline"]["em"]
    return 1 - row["em"] / before if before else 0.0


def _looks(summary: Summary) -> dict[str, Look]:
    return looks(dict.fromkeys(row["latents"] for row in summary["means"]))


def _of_set(summary: Summary, name: str) -> list[Mapping[str, Any]]:
    return sorted((row for row in summary["means"] if row["latents"] == name), key=lambda row: row["lambda"])
