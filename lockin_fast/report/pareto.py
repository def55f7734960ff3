"""Latent sets against each other: the most misalignment that each removes at a given cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lockin_fast.report.figures import blocked_alone
from lockin_fast.report.style import Look, looks, name_cost, offset_copy, percent_axis, save_figure, spread_apart

APART, APART_ALL = 9.0, 40.0  # printer's points between the sets, and over them all

Summary = Mapping[str, Any]
Point = tuple[float, float]  # cost, misalignment removed


def draw_pareto(summary: Summary, folder: Path) -> Path:
    """Write pareto.png of a sweep whose baseline is misaligned into `folder`, and return its path."""
    sets = points_of_sets(summary)
    limit = min(summary["limits"].values())
    every = [point for points in sets.values() for point in points]
    dearest, lowest = max([1.6 * limit, *(cost for cost, _ in every)]), min(removed for _, removed in every)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.set_xlim(-0.04 * dearest, 1.06 * dearest)
        axes.set_ylim(lowest - 0.08 * (1 - lowest), 1 + 0.04 * (1 - lowest))
        for place, (name, look) in enumerate(looks(sets).items()):
            aside = offset_copy(axes, min(APART, APART_ALL / len(sets)) * (place - (len(sets) - 1) / 2))
            _draw_set(axes, sets[name], look, aside)
        _name_lines(axes, sets)
        axes.set_title("The best that each latent set does at a cost")
        axes.set_xlabel("cost: points lost of in-domain or of coherence, whichever is more")
        axes.set_ylabel("misalignment removed")
        axes.tick_params(length=0)
        percent_axis(axes.xaxis)
        percent_axis(axes.yaxis)
        name_cost(axes, limit, "more than is tolerated")

    return save_figure(folder / "pareto.png", (9.2, 5.0), draw)


CAPTION = (
    "Each point is one latent set at one λ: how much of the misalignment of unblocked fine-tuning it removes, against "
    "what it costs, in points of the learned task or of coherence, whichever it loses more of. Each line is the set's "
    "front: the most that it removes at that cost or less. The higher and further left, the better. Sets are drawn a "
    "little apart, so that equal costs can be told apart."
)


def points_of_sets(summary: Summary) -> dict[str, list[Point]]:
    """{latent set: (cost, share of the misalignment removed) of its settings}.

    cost = max(Ad0 - Ad, incoherence - incoherence0, 0), removed = (EM0 - EM) / EM0; 0 is unblocked.
    """
    before = summary["baseline"]
    sets: dict[str, list[Point]] = {}
    for row in blocked_alone(summary)["means"]:
        cost = max(before["in_domain"] - row["in_domain"], row["incoherence"] - before["incoherence"], 0.0)
        sets.setdefault(row["latents"], []).append((cost, 1 - row["em"] / before["em"]))
    return sets


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both: cheapest first, each removing more than those before."""
    best: list[Point] = []
    for cost, removed in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or removed > best[-1][1]:
            best.append((cost, removed))
    return best


def _draw_set(axes: Any, points: Sequence[Point], look: Look, aside: Any) -> None:
    best = front(points)
    steps = [*best, (2 * axes.get_xlim()[1], best[-1][1])]
    axes.step(*zip(*steps, strict=True), where="post", color=look.color, linewidth=2.0, zorder=3, transform=aside)
    style = {"color": look.color, "marker": look.marker, "linestyle": "none", "transform": aside}
    axes.plot(*zip(*points, strict=True), **style, markersize=5, alpha=0.35, zorder=3)
    axes.plot(*zip(*best, strict=True), **style, markersize=8, mec="white", mew=1.0, zorder=4)


def _name_lines(axes: Any, sets: Mapping[str, Sequence[Point]]) -> None:
    """Names at the right end of the fronts instead of a legend."""
    low, high = axes.get_ylim()
    ends = [front(points)[-1][1] for points in sets.values()]
    gap = min(0.055, 0.95 / len(sets)) * (high - low)
    places = spread_apart(ends, gap, low + gap / 2, high - gap / 2)
    for (name, look), place in zip(looks(sets).items(), places, strict=True):
        axes.annotate(
            name, (1.0, place), (8, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
            color=look.color, fontsize=11, fontweight="bold", annotation_clip=False,
        )  # fmt: skip
