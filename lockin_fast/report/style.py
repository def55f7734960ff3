"""The look that all figures share: colours and markers of the latent sets, axes, labels that do not collide."""

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lockin_fast.rundir import write_bytes

INK, MUTED, GRID, WARN = "#1f2933", "#616e7c", "#e4e7eb", "#9b2c2c"
RC = {
    "font.family": "DejaVu Sans",
    "font.size": 11.5,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "axes.edgecolor": "#9aa5b1",
    "axes.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
    "savefig.dpi": 170,
}


class Look(NamedTuple):
    """How one latent set is drawn; shape and colour both tell, so that neither is needed."""

    color: str
    marker: str


KNOWN = {"causal": Look("#0072B2", "o"), "top-delta": Look("#D55E00", "s"), "random": Look("#7b8794", "^")}
ROOM_FOR_WARNING = 0.3  # of an axis' width: what two short lines of a warning take
SPARE = [Look("#009E73", "D"), Look("#CC79A7", "v"), Look("#8a6d00", "P"), Look("#56B4E9", "X"), Look("#4b2e83", "p")]


def save_figure(path: Path, size: tuple[float, float], draw: Callable[[Any], None]) -> Path:
    """Let `draw` fill a figure of `size` inches in the shared style, write it as PNG to `path`, and return that.

    Raises ImportError naming the extra to install when matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'lockin-fast[report]'") from error
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=size, layout="constrained")  # no pyplot: no global state, no display
        draw(figure)
        picture = io.BytesIO()
        figure.savefig(picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, picture.getvalue())
    return path


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Colour and marker of each latent set (Okabe and Ito's palette, safe for colour-blind readers)."""
    spare = 0
    chosen = {}
    for name in names:
        if name in KNOWN:
            chosen[name] = KNOWN[name]
        else:
            color, marker = spare % len(SPARE), (spare + spare // len(SPARE)) % len(SPARE)  # all pairs before any again
            chosen[name] = Look(SPARE[color].color, SPARE[marker].marker)
            spare += 1
    return chosen


def spread_apart(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move `values` as little as a single upward and downward pass allows, so that neighbours are `gap` apart."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    placed = [max(value, low) for value in values]
    for previous, current in zip(order, order[1:], strict=False):
        placed[current] = max(placed[current], placed[previous] + gap)
    ceiling = high
    for current in reversed(order):
        placed[current] = max(min(placed[current], ceiling), low)
        ceiling = placed[current] - gap
    return placed


def name_cost(axes: Any, edge: float, warning: str) -> None:
    """Shade what lies beyond `edge` on the x axis, away from 0, and say why: there, or at the top beside it.

    Comes last: the limits of the axes have to stand.
    """
    axes.axvspan(*((edge - 10, edge) if edge <= 0 else (edge, edge + 10)), color=WARN, alpha=0.06, linewidth=0)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high)
    outward = -1 if edge <= 0 else 1
    room = ((edge - low) if edge <= 0 else (high - edge)) / (high - low)
    fits = room > ROOM_FOR_WARNING
    side = outward if fits else -outward
    axes.annotate(
        warning, (edge, 0.02 if fits else 0.98), (6 * side, 0), xycoords=("data", "axes fraction"),
        textcoords="offset points", ha="left" if side > 0 else "right", va="bottom" if fits else "top", fontsize=9.5,
        color=WARN,
    )  # fmt: skip


def short_number(value: float) -> str:
    """1, 30, 1k, 10k, 1M: short enough for the ticks of a small panel."""
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def lambda_axis(axes: Any, lambdas: Sequence[float]) -> None:
    """A logarithmic axis with one tick for each decade, in plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_xlim(min(lambdas) / 1.6, max(lambdas) * 1.6)
    axes.xaxis.set_major_locator(LogLocator(10, numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, axis="y")
    axes.grid(False, axis="x")
    axes.tick_params(length=0)
    axes.tick_params(axis="x", which="minor", length=2, color="#cbd2d9")


def offset_copy(axes: Any, right: float) -> Any:
    """The transform of `axes`' data, moved `right` by so many printer's points: what coincides can be told apart."""
    from matplotlib.transforms import ScaledTranslation

    return axes.transData + ScaledTranslation(right / 72, 0, axes.figure.dpi_scale_trans)


def percent_axis(axis: Any, *, signed: bool = False) -> None:
    """Ticks of a share in [0, 1] as percentages."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:{'+' if signed and value else ''}.3g}%"))
