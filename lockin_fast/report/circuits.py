"""What the circuits of a model look like: heads by their scores, what they recover, and when induction begins."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lockin_fast.report.style import GRID, INK, KNOWN, MUTED, percent_axis, save_figure, short_number, spread_apart
from lockin_fast.report.text import percent
from lockin_fast.rundir import RunError

FILE = "circuits.json"
NAMED = 3  # heads with a colour of their own in the figure of the onset
FRAMED = 0.5  # prefix-matching score from which a head is framed
COLORS = (KNOWN["causal"].color, KNOWN["top-delta"].color, "#009E73")

Circuits = Mapping[str, Any]


def read_circuits(run: Path) -> dict[str, Any] | None:
    """Return what `run_circuits` left in `run`; None without it. Raises RunError for a file that is no such thing."""
    if not (run / FILE).exists():
        return None
    try:
        found = json.loads((run / FILE).read_text(encoding="utf-8"))
        if not {"prefix", "copying", "thresholds", "onset", "gain"} <= found.keys():
            raise KeyError("prefix, copying, thresholds, onset, gain")
        return found
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise RunError(f"{run / FILE}: not what the circuits of a run are kept as ({error!r}); run it again") from error


def draw_circuits(found: Circuits, folder: Path) -> list[Path]:
    """Write heads.png, recovery.png where some head was patched, and onset.png where there are checkpoints."""
    paths = [_draw_heads(found, folder / "heads.png")]
    if any(row["recovery"] is not None for row in found["thresholds"]):
        paths.append(_draw_recovery(found, folder / "recovery.png"))
    if found["onset"]:
        paths.append(_draw_onset(found, folder / "onset.png"))
    return paths


def captions(found: Circuits) -> dict[str, str]:
    """{stem of the figure's file: the figure in plain words}."""
    layer, head = _strongest(found["prefix"])[0]
    return {
        "heads": "Every square is one attention head. Left: on random tokens repeated twice, the share of its "
        f"attention that goes to what followed the current token the first time; frames mark scores of {FRAMED:g} and "
        "more. Right: whether what it writes for a token raises that token's own logit (1) or lowers it "
        f"(−1){_folded(found)}. The strongest is head {head} of layer {layer}, {found['prefix'][layer][head]:.2f}; "
        f"means over {len(found['seeds'])} draws of random tokens, layers and heads counted from 0.",
        "recovery": "Two copies of random tokens, the first of which is replaced by others: how much of what the model "
        "lost in predicting the second comes back when the outputs of these heads are put in from the run with "
        "both copies. The grey band holds nine of ten sets of as many random heads that are not among them.",
        "onset": f"{onset(found)} Above: prefix-matching score of every head at checkpoints of the training, those "
        "highest in the end in colour. Below: what the first copy adds to the log-probability of the second; a model "
        "that merely repeats words it has seen gains something too, without any induction head.",
    }


def verdict(found: Circuits) -> str:
    """What was found in one or two sentences."""
    counted = [row for row in found["thresholds"] if row["heads"]]
    row = min(counted, key=lambda row: abs(row["threshold"] - FRAMED), default=None)
    layer, head = _strongest(found["prefix"])[0]
    highest = f"the highest is head {head} of layer {layer} with {found['prefix'][layer][head]:.2f}"
    if row is None:
        heads = f"No head reaches the lowest threshold of prefix matching: {highest}."
    else:
        count, total = len(row["heads"]), found["layers"] * found["heads"]
        heads = f"{count} of {total} heads score {row['threshold']:g} or more on prefix matching; {highest}."
    if row is None or row["recovery"] is None:
        return f"{heads} The first copy adds {_nats(found['gain'])} to the log-probability of the second."
    random = row["random"] and (
        f", as many random heads {percent(row['random']['mean'])} "
        f"({percent(row['random']['low'])} to {percent(row['random']['high'])})"
    )
    worth = f"{percent(row['recovery'])} of what the first copy is worth{random or ''}"
    return f"{heads} Together they bring back {worth.replace('-', '−')}."


def onset(found: Circuits) -> str:
    """When a head first reaches FRAMED, in a sentence."""
    for row in found["onset"]:
        if max(map(max, row["prefix"])) >= FRAMED:
            return f"A head first reaches {FRAMED:g} at step {row['step']:,}."
    return f"No head reaches {FRAMED:g} at any checkpoint."


def _nats(value: float) -> str:
    return f"{value:+.2f} nats".replace("-", "−")


def _folded(found: Circuits) -> str:
    return ", with the norms folded into the weights" if found.get("copying_folded") else ""


def _strongest(prefix: list[list[float]]) -> list[tuple[int, int]]:
    """(layer, head) by falling score."""
    heads = [(layer, head) for layer, row in enumerate(prefix) for head in range(len(row))]
    return sorted(heads, key=lambda at: -prefix[at[0]][at[1]])


def _draw_heads(found: Circuits, path: Path) -> Path:
    layers, heads = found["layers"], found["heads"]
    copying = found.get("copying_folded") or found["copying"]
    height = min(max(2.9, 0.3 * layers + 1.9), 11.0)

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, 2 if copying else 1, sharey=True, squeeze=False)[0]
        _heatmap(panels[0], found["prefix"], "Prefix matching", "Blues", (0.0, 1.0))
        for layer, row in enumerate(found["prefix"]):
            for head, score in enumerate(row):
                if score is not None and score >= FRAMED:
                    for axes in panels:
                        _frame(axes, layer, head)
        panels[0].set_ylabel("layer")
        if copying:
            _heatmap(panels[1], copying, "Copying", "RdBu", (-1.0, 1.0))

    return save_figure(path, (min(max(7.2, 0.5 * heads + 3.6), 13.0), height), draw)


def _heatmap(axes: Any, rows: list[list[float | None]], title: str, colors: str, limits: tuple[float, float]) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    shades = colormaps[colors].with_extremes(bad=GRID)
    numbers = [[float("nan") if value is None else value for value in row] for row in rows]
    image = axes.imshow(numbers, cmap=shades, vmin=limits[0], vmax=limits[1], aspect="auto", interpolation="nearest")
    for layer, row in enumerate(rows):
        for head, value in enumerate(row):
            if value is None:
                axes.text(head, layer, "–", ha="center", va="center", color=MUTED)
    axes.set_title(title)
    axes.set_xlabel("head")
    axes.grid(False)
    axes.tick_params(length=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.9, pad=0.02, aspect=24)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


def _frame(axes: Any, layer: int, head: int) -> None:
    from matplotlib.patches import Rectangle

    corner = (head - 0.5, layer - 0.5)
    for level, (color, width) in enumerate((("white", 4), (INK, 2)), 4):  # seen on dark squares and on light ones
        square = Rectangle(corner, 1, 1, fill=False, edgecolor=color, linewidth=width, zorder=level, clip_on=False)
        axes.add_patch(square)


def _draw_recovery(found: Circuits, path: Path) -> Path:
    rows = sorted(found["thresholds"], key=lambda row: row["threshold"])
    thresholds = [row["threshold"] for row in rows]

    def draw(figure: Any) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
        known = [row for row in rows if row["recovery"] is not None]
        beside = [row for row in known if row["random"]]
        if beside:
            at = [row["threshold"] for row in beside]
            low, high = ([row["random"][key] for row in beside] for key in ("low", "high"))
            upper.fill_between(at, low, high, color=KNOWN["random"].color, alpha=0.25, linewidth=0)
            upper.plot(
                at, [row["random"]["mean"] for row in beside], color=KNOWN["random"].color,
                marker=KNOWN["random"].marker, label="as many random heads",
            )  # fmt: skip
        upper.errorbar(
            [row["threshold"] for row in known], [row["recovery"] for row in known],
            yerr=[row["error"] or 0.0 for row in known], color=KNOWN["causal"].color, marker=KNOWN["causal"].marker,
            linewidth=2, capsize=3, zorder=3, label="induction heads",
        )  # fmt: skip
        upper.axhline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        upper.axhline(0, color=GRID, linewidth=1.2, zorder=1)
        upper.set_title("What induction heads bring back")
        upper.set_ylabel("recovered")
        percent_axis(upper.yaxis)
        upper.legend(frameon=False, loc="best")
        counts = [len(row["heads"]) for row in rows]
        width = 0.5 * min((b - a for a, b in zip(thresholds, thresholds[1:], strict=False)), default=0.1)
        lower.bar(thresholds, counts, width=width, color=KNOWN["causal"].color, alpha=0.55)
        for threshold, count in zip(thresholds, counts, strict=True):
            lower.annotate(
                str(count), (threshold, count), (0, 3), textcoords="offset points", ha="center", va="bottom",
                fontsize=10, color=INK,
            )  # fmt: skip
        lower.set_ylim(0, 1.25 * max(counts))
        lower.set_yticks([])
        lower.grid(False)
        lower.spines["left"].set_visible(False)
        lower.set_ylabel("heads")
        lower.set_xticks(thresholds, [f"{threshold:g}" for threshold in thresholds])
        lower.set_xlabel("prefix-matching score from which a head counts as an induction head")
        for axes in (upper, lower):
            axes.tick_params(length=0)
            axes.grid(False, axis="x")

    return save_figure(path, (8.6, 5.6), draw)


def _draw_onset(found: Circuits, path: Path) -> Path:
    rows = found["onset"]
    steps = [row["step"] for row in rows]
    named = _strongest(rows[-1]["prefix"])[:NAMED]

    def draw(figure: Any) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
        for layer, of_layer in enumerate(rows[-1]["prefix"]):
            for head in range(len(of_layer)):
                if (layer, head) not in named:
                    upper.plot(steps, [row["prefix"][layer][head] for row in rows], color="#cbd2d9", linewidth=1)
        ends = [rows[-1]["prefix"][layer][head] for layer, head in named]
        for (layer, head), color, end in zip(named, COLORS, spread_apart(ends, 0.07, 0.0, 1.0), strict=False):
            upper.plot(steps, [row["prefix"][layer][head] for row in rows], color=color, linewidth=2.2, zorder=3)
            upper.annotate(
                f"layer {layer} head {head}", (steps[-1], end), (8, 0), textcoords="offset points", va="center",
                color=color, fontsize=10.5, annotation_clip=False,
            )  # fmt: skip
        upper.set_ylim(0, 1.02)
        upper.set_title("Induction over training")
        upper.set_ylabel("prefix matching")
        lower.plot(steps, [row["gain"] for row in rows], color=INK, linewidth=2)
        lower.axhline(0, color=GRID, linewidth=1.2, zorder=1)
        lower.set_ylabel("gain of the\ncopy, nats")
        lower.set_xlabel("training step")
        _step_axis(lower, steps)
        for axes in (upper, lower):
            axes.tick_params(length=0)
            axes.grid(False, axis="x")

    return save_figure(path, (8.6, 5.6), draw)


def _step_axis(axes: Any, steps: list[int]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
