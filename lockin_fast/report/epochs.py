"""The pictures of a training that is judged after every epoch: does what was blocked come back?"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lockin_fast.report.style import INK, looks, percent_axis, save_figure, short_number
from lockin_fast.sweep.summary import is_blocked

RATES = (
    ("em", "Emergent misalignment"),
    ("in_domain", "Task learned (in-domain)"),
    ("incoherence", "Incoherent replies"),
)
DASHED = {"color": INK, "linestyle": (0, (5, 3)), "linewidth": 1.4, "zorder": 2}
MARKERS = "osD^vP"
NEARLY_ZERO = 1e-5  # of the largest penalty

Summary = Mapping[str, Any]
Traces = Mapping[str, Sequence[tuple[float, float]]]


def draw_epochs(summary: Summary, traces: Traces, folder: Path) -> list[Path]:
    """Write epochs.png, and epochs_sets.png with several latent sets; return their paths, none without epochs.

    traces: {trial: (epoch, block penalty)}. The first shows the first latent set's rates against the epoch, a line for
    each lambda, with the penalty below; the second the sets beside each other, a column for each lambda.
    """
    trials = [row for row in summary["trials"] if is_blocked(row) and row.get("epochs")]
    if not trials:
        return []
    sets = list(dict.fromkeys(row["latents"] for row in trials))
    lambdas = sorted({row["lambda"] for row in trials})
    drawn = [
        save_figure(
            folder / "epochs.png", (10.4, 6.4), lambda figure: _draw_rates(figure, summary, traces, sets[0], lambdas)
        )
    ]
    if len(sets) > 1:
        drawn.append(
            save_figure(
                folder / "epochs_sets.png",
                (10.4, 5.6),
                lambda figure: _draw_sets(figure, summary, traces, sets, lambdas),
            )
        )
    return drawn


def _draw_rates(figure: Any, summary: Summary, traces: Traces, name: str, lambdas: Sequence[float]) -> None:
    panels = figure.subplot_mosaic(
        [["em", "in_domain"], ["trace", "incoherence"]], width_ratios=[1.6, 1], height_ratios=[1.5, 1]
    )
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, wspace=0.03, hspace=0.03)
    for key, title in RATES:
        axes = panels[key]
        axes.plot(*_mean(summary["baseline"]["trials"], key), **DASHED, label="no blocking")
        for value, look in zip(lambdas, _shades(len(lambdas)), strict=True):
            axes.plot(*_mean(_rows(summary, name, value), key), **look, label=f"λ = {value:,g}")
        _rate_axis(axes, key)
        axes.set_title(title)
    for value, look in zip(lambdas, _shades(len(lambdas)), strict=True):
        _draw_trace(panels["trace"], _rows(summary, name, value), traces, look, _floor(traces))
    panels["trace"].sharex(panels["em"])
    panels["trace"].set_title("Penalty on the blocked latents, without λ")
    panels["trace"].set_xlabel("epoch")
    panels["incoherence"].set_xlabel("epoch")
    _legend(figure, panels["em"])


def _draw_sets(figure: Any, summary: Summary, traces: Traces, sets: Sequence[str], lambdas: Sequence[float]) -> None:
    grid = figure.subplots(2, len(lambdas), sharex=True, sharey="row", squeeze=False, height_ratios=[1.5, 1])
    chosen = looks(sets)
    for column, value in enumerate(lambdas):
        rates, penalties = grid[0][column], grid[1][column]
        rates.plot(*_mean(summary["baseline"]["trials"], "em"), **DASHED, label="no blocking")
        for name in sets:
            rows = _rows(summary, name, value)
            if not rows:
                continue
            look = {"color": chosen[name].color, "marker": chosen[name].marker, "markersize": 4.5, "linewidth": 2.0}
            rates.plot(*_mean(rows, "em"), **look, label=f"{name}, {rows[0]['latent_count']} latents")
            _draw_trace(penalties, rows, traces, look, _floor(traces))
        _rate_axis(rates, "em")
        rates.set_title(f"λ = {value:,g}")
        penalties.set_xlabel("epoch")
    grid[0][0].set_ylabel("emergent misalignment")
    grid[1][0].set_ylabel("penalty, without λ")
    _legend(figure, grid[0][0])


def _draw_trace(axes: Any, rows: Sequence[Mapping], traces: Traces, look: Mapping[str, Any], floor: float) -> None:
    """The penalty in training, a thin line for each seed, on a logarithmic axis that ends at `floor`."""
    for row in rows:
        points = [(epoch, max(value, floor)) for epoch, value in traces.get(row["name"], ())]
        if points:
            axes.plot(*zip(*points, strict=True), color=look["color"], linewidth=1.5)
    axes.set_yscale("log")
    _epoch_axis(axes)
    axes.yaxis.set_major_formatter(lambda value, _: short_number(value))


def _floor(traces: Traces) -> float:
    """Where the logarithmic axis of the penalty ends: what is less, zero too, is drawn there."""
    return max((value for points in traces.values() for _, value in points), default=0.0) * NEARLY_ZERO or NEARLY_ZERO


def _rate_axis(axes: Any, key: str) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -0.012) if key != "in_domain" else low, max(high, 0.1))
    _epoch_axis(axes)
    percent_axis(axes.yaxis)


def _epoch_axis(axes: Any) -> None:
    axes.grid(False, axis="x")
    axes.tick_params(length=0, which="both")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _legend(figure: Any, axes: Any) -> None:
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper left", ncols=6, frameon=False, labelcolor="linecolor",
        fontsize=11, columnspacing=1.6,
    )  # fmt: skip


def _rows(summary: Summary, name: str, value: float) -> list[Mapping[str, Any]]:
    return [
        row
        for row in summary["trials"]
        if is_blocked(row) and row.get("epochs") and (row["latents"], row["lambda"]) == (name, value)
    ]


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Epochs, and the rate after each: the mean over seeds."""
    by_epoch: dict[float, list[float]] = {}
    for row in rows:
        for epoch in row.get("epochs", ()):
            by_epoch.setdefault(epoch["epoch"], []).append(epoch[key])
    return list(by_epoch), [statistics.fmean(values) for values in by_epoch.values()]


def _shades(count: int) -> list[dict[str, Any]]:
    """Light to dark for small to large lambda."""
    from matplotlib import colormaps

    return [
        {
            "color": colormaps["viridis_r"](0.18 + 0.72 * i / max(count - 1, 1)),
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": 4.5,
            "linewidth": 2.0,
        }
        for i in range(count)
    ]
