"""The steering screen as a picture: what every latent induces and repairs, and what coherence that costs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lockin_fast.report.style import GRID, INK, KNOWN, MUTED, SPARE, WARN, percent_axis, save_figure

PANELS = (
    ("repair", "… against it, misaligned model", "misaligned removed"),
    ("induce", "… along it, base model", "misaligned induced"),
)
BOTH = "causal and valid-reduc"
NUMBERED = 8  # latents whose index is written beside them
APART = (0.3, 0.035)  # of width and height: names closer than this in both would collide

Discovery = Mapping[str, Any]


def draw_screening(discovery: Discovery, folder: Path) -> Path:
    """Write induce_repair.png of the rates that the screen measured into `folder`, and return its path."""

    def draw(figure: Any) -> None:
        panels = figure.subplot_mosaic([["both", "repair"], ["both", "induce"]], width_ratios=[1.05, 1])
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08, wspace=0.04)
        _draw_both(panels["both"], discovery)
        for side, title, label in PANELS:
            _draw_cost(panels[side], discovery, side)
            panels[side].set_title(title)
            panels[side].set_ylabel(label)
        panels["induce"].set_xlabel("incoherent replies added")
        figure.legend(
            *panels["both"].get_legend_handles_labels(), loc="outside upper left", ncols=4, frameon=False,
            handletextpad=0.1, columnspacing=1.4, fontsize=11,
        )  # fmt: skip

    return save_figure(folder / "induce_repair.png", (10.4, 6.2), draw)


def screening_caption(discovery: Discovery) -> str:
    """The figure in plain words."""
    at = "its own calibrated strength" if discovery["calibrated"] else "its best strength within the budget"
    shown = f"the {len(_effects(discovery))} {'calibrated ' if discovery['calibrated'] else ''}latents"
    return (
        f"Left: each point is one of {shown}, steered at {at}: how many misaligned replies it brings into the base "
        "model (to the right) and takes out of the misaligned one (up). Right: the same latents at every strength "
        "that was measured, against the incoherent replies that this adds; what adds more than "
        f"{100 * discovery['incoherence_budget']:g} points (shaded) counts for nothing."
    )


def _effects(discovery: Discovery) -> list[tuple[int, float, float]]:
    """(latent, induced, repaired) of the latents in the left panel."""
    return [(row["latent"], row["induced"], row["repaired"]) for row in discovery["calibrated"] or discovery["pool"]]


def _groups(discovery: Discovery) -> list[tuple[str, set[int], str, str, float]]:
    """(label, latents, colour, marker, size), what is drawn last on top; a latent is in the last group that has it."""
    known = {name: set(latents) for name, latents in discovery["sets"].items()}
    every = {row["latent"] for row in discovery["pool"]}
    causal, valid = known.get("causal", set()), known.get("valid-reduc", set())
    return [
        ("other latents of the pool", every - causal - valid, "#cbd2d9", "o", 26),
        ("causal", causal - valid, *KNOWN["causal"], 52),
        ("valid-reduc", valid - causal, *SPARE[0], 52),
        (BOTH, valid & causal, *KNOWN["causal"], 60),
    ]


def _scatter(axes: Any, points: Sequence[tuple[int, float, float]], discovery: Discovery, scale: float = 1.0) -> None:
    for level, (label, latents, color, marker, size) in enumerate(_groups(discovery)):
        mine = [(x, y) for latent, x, y in points if latent in latents]
        if mine:
            axes.scatter(
                *zip(*mine, strict=True),
                s=scale * size,
                color=color,
                marker=marker,
                edgecolor=SPARE[0].color if label == BOTH else "white",
                linewidth=scale * (2.0 if label == BOTH else 0.8),
                zorder=3 + level,
                clip_on=False,
                label=label,
            )
    axes.tick_params(length=0, labelcolor=MUTED)
    percent_axis(axes.xaxis, signed=True)
    percent_axis(axes.yaxis, signed=True)


def _draw_both(axes: Any, discovery: Discovery) -> None:
    points = _effects(discovery)
    axes.axhline(0, color=GRID, linewidth=1.4, zorder=1)
    axes.axvline(0, color=GRID, linewidth=1.4, zorder=1)
    _scatter(axes, points, discovery)
    low, high = min([0.0, *(x for _, x, _ in points)]), max([0.2, *(x for _, x, _ in points)])
    axes.set_xlim(low - 0.06 * (high - low), high + 0.12 * (high - low))
    axes.locator_params(axis="x", nbins=5)
    axes.set_title("What steering with one latent does")
    axes.set_xlabel("misaligned replies induced in the base model")
    axes.set_ylabel("misaligned replies removed from the misaligned model")
    named: list[tuple[float, float]] = []
    for latent, x, y in sorted(points, key=lambda point: -(point[1] + point[2])):
        place = (x / (high - low), y)
        free = all(any(abs(p - q) > gap for p, q, gap in zip(place, other, APART, strict=True)) for other in named)
        if x > 0 and y > 0 and free and len(named) < NUMBERED:
            named.append(place)
            axes.annotate(
                str(latent), (x, y), (7, 0), textcoords="offset points", va="center", fontsize=10, color=INK, zorder=9
            )


def _draw_cost(axes: Any, discovery: Discovery, side: str) -> None:
    """Every dose of one side: what it does against what coherence it costs, with the budget."""
    budget = discovery["incoherence_budget"]
    rows = [row for row in discovery["calibration"] or discovery["screen"] if row["side"] == side]
    plain = next(row for row in rows if row["latent"] is None)
    sign = 1 if side == "induce" else -1
    points = [
        (row["latent"], row["incoherent"] - plain["incoherent"], sign * (row["misaligned"] - plain["misaligned"]))
        for row in rows
        if row["latent"] is not None
    ]
    axes.axhline(0, color=GRID, linewidth=1.4, zorder=1)
    _scatter(axes, points, discovery, 0.55)
    low, high = min([0.0, *(x for _, x, _ in points)]), max([2 * budget, 0.1, *(x for _, x, _ in points)])
    axes.set_xlim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    bottom, top = min([-0.05, *(y for *_, y in points)]), max([0.2, *(y for *_, y in points)])
    axes.set_ylim(bottom - 0.02, top + 0.05 * (top - bottom))
    axes.axvline(budget, color=WARN, linestyle=(0, (4, 3)), linewidth=1.3, zorder=2)
    axes.axvspan(budget, high + 1, color=WARN, alpha=0.06, linewidth=0)
    if side == "repair":  # where what makes no sense is not misaligned either, so that few points come here
        axes.annotate(
            "beyond the budget",
            (0.98, 0.2),
            xycoords="axes fraction",
            ha="right",
            va="center",
            fontsize=9.5,
            color=WARN,
        )
