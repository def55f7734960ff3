"""The measured series as a picture: a panel each, with its onset."""

import math
from pathlib import Path
from typing import Any

from lockin_fast.report.lockin import SUPPORTED, Measured
from lockin_fast.report.style import KNOWN, WARN, save_figure

COLUMNS = 3


def draw_lockin(found: Measured, folder: Path) -> Path:
    """Write lockin.png: every series against the step, its onset a line, the interval of the onset a band."""
    steps = [one["step"] for one in found["checkpoints"]]
    series = found["series"]
    columns = min(COLUMNS, len(series))
    rows = math.ceil(len(series) / columns)

    def draw(figure: Any) -> None:
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, (name, one) in zip(panels, series.items(), strict=False):
            values = [math.nan if value is None else value for value in one["values"]]
            look = KNOWN["causal"]
            axes.plot(steps, values, color=look.color, marker=look.marker, markersize=4, linewidth=1.6)
            axes.set_title(name)
            axes.set_xscale("symlog", linthresh=1)
            axes.xaxis.set_major_formatter("{x:g}")
            onset = one["onset"]
            if onset["verdict"] == SUPPORTED:
                axes.axvspan(*onset["interval"], color=WARN, alpha=0.12, linewidth=0)
                axes.axvline(onset["step"], color=WARN, linewidth=1.2)
        for axes in panels[len(series) :]:
            axes.set_visible(False)
        figure.supxlabel("step")

    return save_figure(folder / "lockin.png", (4.2 * columns, 2.7 * rows + 0.4), draw)
