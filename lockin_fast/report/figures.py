"""The pictures of a sweep: rates against lambda, and what less misalignment costs in the learned task."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lockin_fast.report.style import INK, RC, WARN, Look, lambda_axis, looks, percent_axis, spread_apart
from lockin_fast.rundir import write_bytes

Summary = Mapping[str, Any]


def draw_figures(summary: Summary, folder: Path) -> list[Path]:
    """Write sweep.png and trade_off.png of a sweep's `summary` into `folder`; return their paths.

    Raises ImportError naming the extra to install when matplotlib is missing, ValueError when nothing was swept.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'lockin-fast[report]'") from error
    if not summary["means"]:
        raise ValueError("summary: it holds no blocked trial, so there is nothing to draw")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context(RC):
        for name, size, draw in (("sweep", (10.4, 5.4), _draw_sweep), ("trade_off", (7.6, 5.0), _draw_trade_off)):
            figure = Figure(figsize=size, layout="constrained")  # no pyplot: no global state, no display
            draw(figure, summary)
            paths.append(folder / f"{name}.png")
            picture = io.BytesIO()
            figure.savefig(picture)
            write_bytes(paths[-1], picture.getvalue())
    return paths


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
        (0.03, edge),
        (0, -4 if key == "in_domain" else 4),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="left",
        fontsize=9.5,
        color=WARN,
        va="top" if key == "in_domain" else "bottom",
    )


def _name_lines(axes: Any, summary: Summary) -> None:
    """Names at the right end of the lines instead of a legend."""
    names = _looks(summary)
    ends = [_of_set(summary, name)[-1] for name in names]
    low, high = axes.get_ylim()
    unblocked = summary["baseline"]["em"]
    labels = [*(f"{row['latents']}\n{row['latent_count']} latents" for row in ends), "no blocking"]
    colors = [*(look.color for look in names.values()), INK]
    wanted = [*(row["em"] for row in ends), unblocked]
    places = spread_apart(wanted, 0.105 * (high - low), low + 0.04 * (high - low), high)
    for label, color, place in zip(labels, colors, places, strict=True):
        axes.annotate(
            label,
            (1.0, place),
            (8, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=11,
            linespacing=1.05,
            fontweight="bold",
            annotation_clip=False,
        )


def _draw_trade_off(figure: Any, summary: Summary) -> None:
    axes = figure.subplots()
    unblocked = summary["baseline"]
    points = {name: [_trade_off(row, unblocked) for row in _of_set(summary, name)] for name in _looks(summary)}
    every = [point for of_set in points.values() for point in of_set]
    edge = -summary["limits"]["in_domain_drop"] / unblocked["in_domain"] if unblocked["in_domain"] else 0.0
    low, high = min([x for x, _ in every] + [1.6 * edge]), max([x for x, _ in every] + [0.004])
    axes.set_xlim(low - 0.06 * (high - low), high + 0.1 * (high - low))
    bottom = min([y for _, y in every] + [0.0])
    axes.set_ylim(bottom - 0.07 * (1 - bottom), 1.09)
    axes.axvspan(-10, edge, color=WARN, alpha=0.06, linewidth=0)
    axes.annotate(
        "task down by more\nthan 2 points",
        (edge, 0.02),
        (-6, 0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=9.5,
        color=WARN,
    )
    axes.scatter([0], [0], s=70, color=INK, marker="D", zorder=4, edgecolor="white", label="no blocking")
    for name, look in _looks(summary).items():
        _draw_path(axes, name, points[name], _of_set(summary, name), look)
    if summary["best"]:
        x, y = _trade_off(summary["best"], unblocked)
        axes.plot([x], [y], marker="o", markersize=19, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.6)
        side = -1 if x > sum(axes.get_xlim()) / 2 else 1
        axes.annotate(
            f"best: {summary['best']['latents']}, λ = {summary['best']['lambda']:,g}",
            (x, y),
            (15 * side, 2),
            textcoords="offset points",
            ha="right" if side < 0 else "left",
            va="center",
            fontsize=11,
            fontweight="bold",
        )
    percent_axis(axes.xaxis, signed=True)
    percent_axis(axes.yaxis)
    axes.tick_params(length=0)
    axes.locator_params(axis="x", nbins=6)
    figure.legend(
        loc="outside upper left",
        ncols=4,
        frameon=False,
        labelcolor="linecolor",
        handletextpad=0.1,
        columnspacing=1.4,
        fontsize=11,
    )
    axes.set_title("What less misalignment costs the learned task")
    axes.set_xlabel("change of in-domain performance  ΔAd = (Ad − Ad₀) / Ad₀")
    axes.set_ylabel("misalignment removed  ΔEM = (EM₀ − EM) / EM₀")


def _draw_path(axes: Any, name: str, points: list[tuple[float, float]], rows: list[Mapping], look: Look) -> None:
    """The settings of one latent set in order of lambda; larger markers for larger lambda."""
    x, y = [point[0] for point in points], [point[1] for point in points]
    axes.plot(x, y, color=look.color, linewidth=1.3, alpha=0.45, zorder=2)
    sizes = [45 + 70 * i / max(len(rows) - 1, 1) for i in range(len(rows))]
    axes.scatter(
        x,
        y,
        s=sizes,
        color=look.color,
        marker=look.marker,
        edgecolor="white",
        linewidth=1.0,
        zorder=3,
        label=f"{name}, {rows[0]['latent_count']} latents",
    )


def _trade_off(row: Mapping[str, Any], unblocked: Mapping[str, Any]) -> tuple[float, float]:
    """(dAd, dEM) of a setting against the unblocked baseline; 0 where the baseline leaves nothing to change."""
    task = row["in_domain"] / unblocked["in_domain"] - 1 if unblocked["in_domain"] else 0.0
    return task, 1 - row["em"] / unblocked["em"] if unblocked["em"] else 0.0


def _looks(summary: Summary) -> dict[str, Look]:
    return looks(dict.fromkeys(row["latents"] for row in summary["means"]))


def _of_set(summary: Summary, name: str) -> list[Mapping[str, Any]]:
    return sorted((row for row in summary["means"] if row["latents"] == name), key=lambda row: row["lambda"])
