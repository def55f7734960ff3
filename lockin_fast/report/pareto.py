"""Latent sets against each other: the most misalignment that each removes at a given cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lockin_fast.report.figures import blocked_alone
from lockin_fast.report.style import Look, looks, name_cost, percent_axis, save_figure

Summary = Mapping[str, Any]
Point = tuple[float, float]  # cost, misalignment removed


def draw_pareto(summary: Summary, folder: Path) -> Path:
    """Write pareto.png of a sweep whose baseline is misaligned into `folder`, and return its path."""
    sets = points_of_sets(summary)
    limit = min(summary["limits"].values())

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        every = [point for points in sets.values() for point in points]
        high = max([1.6 * limit, *(cost for cost, _ in every)])
        axes.set_xlim(-0.03 * high, 1.06 * high)
        axes.set_ylim(min([-0.03, *(removed - 0.03 for _, removed in every)]), 1.04)
        for level, (name, look) in enumerate(looks(sets).items()):
            _draw_set(axes, sets[name], name, look, 3 + level)
        axes.set_title("The best that each latent set does at a cost")
        axes.set_xlabel("cost: points lost of in-domain or of coherence, whichever is more")
        axes.set_ylabel("misalignment removed")
        axes.tick_params(length=0)
        percent_axis(axes.xaxis)
        percent_axis(axes.yaxis)
        name_cost(axes, limit, "more than is tolerated")
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside upper left", ncols=5, frameon=False, fontsize=11,
            labelcolor="linecolor", columnspacing=1.4,
        )  # fmt: skip

    return save_figure(folder / "pareto.png", (9.2, 5.0), draw)


CAPTION = (
    "Each point is one latent set at one λ: how much of the misalignment of unblocked fine-tuning it removes, against "
    "what it costs, in points of the learned task or of coherence, whichever it loses more of. Each line is the set's "
    "front: the most that it removes at that cost or less. The higher and further left, the better."
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


def _draw_set(axes: Any, points: Sequence[Point], name: str, look: Look, level: int) -> None:
    best = front(points)
    style = {"color": look.color, "marker": look.marker, "zorder": level}
    axes.plot(*zip(*points, strict=True), **style, markersize=5, alpha=0.35, linestyle="none")
    steps = [*best, (axes.get_xlim()[1], best[-1][1])]
    axes.step(*zip(*steps, strict=True), where="post", color=look.color, linewidth=2.0, zorder=level)
    style |= {"markersize": 8, "markeredgecolor": "white", "markeredgewidth": 1.0, "zorder": level + 10}
    axes.plot(*zip(*best, strict=True), **style, linestyle="none")
    axes.plot([], [], **style, linewidth=2.0, label=name)  # for the legend: line and marker
