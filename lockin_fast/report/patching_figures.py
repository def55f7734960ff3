"""What patching found as pictures: layers by positions, and heads, coloured by the effect of their patches."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lockin_fast.report.patching import TARGETS, TITLES, Patching, signed, sites_of
from lockin_fast.report.style import INK, MUTED, save_figure
from lockin_fast.report.text import percent


def draw_patching(found: Patching, folder: Path) -> list[Path]:
    """Write patching.png (the residual stream) and patching_components.png, as far as there is something to draw."""
    paths = []
    directions = [direction for direction in TITLES if sites_of(found, direction, "residual")]
    if directions:
        paths.append(_draw_residual(found, directions, folder / "patching.png"))
    others = [c for c in ("attention", "mlp", "heads") if any(row["component"] == c for row in found["sites"])]
    if others:
        paths.append(_draw_components(found, others, folder / "patching_components.png"))
    return paths


def _draw_residual(found: Patching, directions: Sequence[str], path: Path) -> Path:
    judged = any(row["misaligned"] is not None for row in sites_of(found, directions[0], "residual"))
    layers, positions = _axes(sites_of(found, directions[0], "residual"))
    size = (max(5.6, 1.9 + 0.62 * len(layers)) * (2 if judged else 1), (1.5 + 0.46 * len(positions)) * len(directions))

    def draw(figure: Any) -> None:
        panels = figure.subplots(len(directions), 2 if judged else 1, squeeze=False)
        figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
        for line, direction in zip(panels, directions, strict=True):
            sites = sites_of(found, direction, "residual")
            target, source = TARGETS[direction]
            if judged:
                before, there = (found["clean"][side]["misaligned"] for side in (target, source))
                title = f"{direction}: misaligned replies ({percent(before)} unpatched, source {percent(there)})"
                panel = line[0], sites, layers, positions
                _heatmap(*panel, lambda row: row["misaligned"], percent, title, "Reds", (0, 1))
            _moved(line[-1], sites, layers, positions, f"{direction}, log-probabilities")
        for axes in panels[-1]:
            axes.set_xlabel("layer whose output is patched")

    return save_figure(path, size, draw)


def _moved(axes: Any, sites: Sequence[Mapping], layers: Sequence, positions: Sequence, name: str) -> None:
    """The panel of logit differences: shares of the way to the source, or nats where those mean nothing."""
    if any(row["recovery"] is not None for row in sites):
        title = f"{name}: moved to the source"
        _heatmap(axes, sites, layers, positions, lambda row: row["recovery"], percent, title, "Blues", (0, 1))
    else:
        most = max((abs(row["change"]) for row in sites if row["change"] is not None), default=1.0) or 1.0
        title = f"{name}: change in nats"
        _heatmap(axes, sites, layers, positions, lambda row: row["change"], signed, title, "RdBu_r", (-most, most))


def _draw_components(found: Patching, components: Sequence[str], path: Path) -> Path:
    """Attention and MLP outputs by position, heads at the positions where they move most."""
    directions = [direction for direction in TITLES if sites_of(found, direction, components[0])]
    drawn = {}
    for component in components:
        for direction in directions:
            sites = sites_of(found, direction, component)
            if component == "heads":
                sites = _most_moved(sites)
                sites = [row | {"positions": f"head {row['head']}", "at": row["positions"]} for row in sites]
            drawn[component, direction] = sites
    layers = _axes(drawn[components[0], directions[0]])[0]
    heights = [0.9 + 0.4 * len(_axes(drawn[component, directions[0]])[1]) for component in components]
    size = (max(5.6, 1.9 + 0.62 * len(layers)) * len(directions), sum(heights) + 0.6)

    def draw(figure: Any) -> None:
        panels = figure.subplots(len(components), len(directions), squeeze=False, height_ratios=heights)
        figure.get_layout_engine().set(h_pad=0.1, w_pad=0.12)
        for line, component in zip(panels, components, strict=True):
            for axes, direction in zip(line, directions, strict=True):
                sites = drawn[component, direction]
                where = f" at {sites[0]['at']}" if component == "heads" else ""
                _moved(axes, sites, *_axes(sites), f"{direction}, {component}{where}")
        for axes in panels[-1]:
            axes.set_xlabel("layer")

    return save_figure(path, size, draw)


def _most_moved(sites: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The sites of the one position set where the largest change is."""
    best = max(sites, key=lambda row: abs(row["change"] or 0.0))
    return [row for row in sites if row["positions"] == best["positions"]]


def _heatmap(
    axes: Any, sites: Sequence[Mapping], layers: Sequence, positions: Sequence, value: Callable, text: Callable,
    title: str, colors: str, limits: tuple[float, float],
) -> None:  # fmt: skip
    values = {(row["positions"], row["layer"]): value(row) for row in sites}
    grid = [[float("nan") if (v := values.get((p, k))) is None else v for k in layers] for p in positions]
    low, high = limits
    axes.imshow(grid, aspect="auto", cmap=colors, vmin=low, vmax=high + 0.25 * (high - low) * (low == 0))
    axes.set_facecolor("#eef1f4")  # what was not measured
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_yticks(range(len(positions)), positions)
    axes.set_xticks([x + 0.5 for x in range(len(layers) - 1)], minor=True)
    axes.set_yticks([y + 0.5 for y in range(len(positions) - 1)], minor=True)
    axes.grid(False)
    axes.grid(True, which="minor", color="white", linewidth=1.5)
    axes.tick_params(length=0, which="both", labelcolor=MUTED)
    axes.set_title(title, fontsize=11)
    for spine in axes.spines.values():
        spine.set_visible(False)
    size = 9.5 if len(layers) <= 16 else 6.5
    for y, line in enumerate(grid):
        for x, cell in enumerate(line):
            strong = abs(cell - (low + high) / 2 * (low != 0)) > 0.62 * max(abs(low), abs(high))
            if cell == cell and len(layers) <= 40:
                axes.text(x, y, _short(text(cell)), ha="center", va="center", fontsize=size,
                          color="white" if strong else INK)  # fmt: skip


def _short(text: str) -> str:
    """Whole per cents in a picture."""
    return f"{float(text[:-1]):.0f}%".replace("-0%", "0%").replace("-", "−") if text.endswith("%") else text


def _axes(sites: Sequence[Mapping[str, Any]]) -> tuple[list, list]:
    return sorted({row["layer"] for row in sites}), list(dict.fromkeys(row["positions"] for row in sites))
