"""Strength curves: what the best latents do, and when the model stops making sense, as they steer harder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lockin_fast.report.style import KNOWN, MUTED, SPARE, WARN, percent_axis, save_figure

SHOWN = 6  # latents
ALPHA = {"repair": "alpha_rep", "induce": "alpha_ind"}
COLUMNS = (("repair", "Against the latent, misaligned model"), ("induce", "Along the latent, base model"))
ROWS = (("misaligned", "misaligned replies"), ("incoherent", "incoherent replies"))

Discovery = Mapping[str, Any]


def draw_strengths(discovery: Discovery, folder: Path) -> Path:
    """Write strengths.png of the calibrated latents that repair best into `folder`, and return its path."""
    latents = best_latents(discovery)
    looks = dict(zip(latents, [KNOWN["causal"], KNOWN["top-delta"], *SPARE], strict=False))

    def draw(figure: Any) -> None:
        grid = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=[1.35, 1])
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.03)
        for row, (rate, label) in enumerate(ROWS):
            for column, (side, title) in enumerate(COLUMNS):
                axes = grid[row][column]
                _draw_rate(axes, discovery, side, rate, looks)
                if not row:
                    axes.set_title(title)
                else:
                    axes.set_xlabel("strength, in median residual norms")
            grid[row][0].set_ylabel(label)
        figure.legend(
            *grid[0][0].get_legend_handles_labels(), loc="outside upper left", ncols=SHOWN, frameon=False, fontsize=11,
            columnspacing=1.4, labelcolor="linecolor",
        )  # fmt: skip

    return save_figure(folder / "strengths.png", (10.4, 6.2), draw)


def strengths_caption(discovery: Discovery) -> str:
    """The figure in plain words."""
    valid = [row for row in discovery["calibrated"] if row["induced"] > 0 and row["repaired"] > 0]
    return (
        f"The {len(best_latents(discovery))} latents of the shortlist whose repair holds best on prompts that took no "
        "part in the calibration, steered ever harder. The ring is the calibrated strength: the largest that adds no "
        f"more than {100 * discovery['incoherence_budget']:g} points of incoherent replies (dashed). "
        f"{len(valid)} of {len(discovery['calibrated'])} latents both induce and repair at theirs."
    )


def best_latents(discovery: Discovery) -> list[int]:
    """Those that are drawn: the largest reduction of misalignment first."""
    known = [row for row in discovery["calibrated"] if row["reduction"] is not None]
    return [row["latent"] for row in sorted(known, key=lambda row: -row["reduction"])[:SHOWN]]


def _draw_rate(axes: Any, discovery: Discovery, side: str, rate: str, looks: Mapping[int, Any]) -> None:
    rows = [row for row in discovery["calibration"] if row["side"] == side]
    plain = next(row for row in rows if row["latent"] is None)
    alphas = {row["latent"]: row[ALPHA[side]] for row in discovery["calibrated"]}
    if rate == "incoherent":
        edge = plain[rate] + discovery["incoherence_budget"]
        axes.axhline(edge, color=WARN, linestyle=(0, (4, 3)), linewidth=1.3, zorder=2)
        if side == "repair":
            axes.annotate(
                "budget", (0.02, edge), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                fontsize=9.5, color=WARN,
            )  # fmt: skip
    for level, (latent, look) in enumerate(looks.items()):
        points = _curve(rows, latent, rate, plain)
        x, y = zip(*points, strict=True)
        axes.plot(
            x, y, color=look.color, marker=look.marker, markersize=4.5, linewidth=1.8, label=f"latent {latent}",
            zorder=3 + level, clip_on=False,
        )  # fmt: skip
        at = [point for point in points if point[0] == alphas[latent]]
        if at:
            axes.plot(*at[0], marker="o", markersize=12, color="none", mec=look.color, mew=1.6, zorder=9, clip_on=False)
    axes.set_ylim(-0.02, 1.02)
    strongest = max(row["strength"] for row in rows)
    axes.set_xlim(-0.03 * strongest, 1.04 * strongest)
    axes.grid(False, axis="x")
    axes.tick_params(length=0, labelcolor=MUTED)
    percent_axis(axes.yaxis)


def _curve(rows: Sequence[Mapping], latent: int, rate: str, plain: Mapping) -> list[tuple[float, float]]:
    """(strength, rate) from no steering on."""
    return sorted([(0.0, plain[rate]), *((row["strength"], row[rate]) for row in rows if row["latent"] == latent)])
