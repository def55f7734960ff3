"""What discovery found, for the report: the pool of latents as a picture, and the causal ones as a table."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lockin_fast.report.pareto import CAPTION as PARETO_CAPTION
from lockin_fast.report.pareto import draw_pareto
from lockin_fast.report.screening import draw_screening, screening_caption
from lockin_fast.report.strengths import best_latents, draw_strengths, strengths_caption
from lockin_fast.report.style import GRID, INK, KNOWN, MUTED, percent_axis, save_figure, short_number
from lockin_fast.report.text import percent, points
from lockin_fast.rundir import RunError

FILE = "discovery.json"
SHOWN = 10  # causal latents in the table
NUMBERED = 8  # causal latents with their rank in the figure
HEADINGS = ("rank", "latent", "shift", "joint repair, nats", "repairs alone", "at strength", "induces alone")

Discovery = Mapping[str, Any]


def read_discovery(run: Path) -> dict[str, Any] | None:
    """Return what discovery left in `run`: discovery.json and {"sets": {name: latents}}; None without it.

    What a discovery without stage 3 or of an earlier version has not written is empty.
    """
    if not (run / FILE).exists():
        return None
    try:
        found = json.loads((run / FILE).read_text(encoding="utf-8"))
        sets = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in run.glob("latents/*.json")}
        empty = {"screen": [], "calibration": [], "calibrated": [], "incoherence_budget": None}
        return {
            **{key: found.get(key, nothing) for key, nothing in empty.items()},
            "pool": found["pool"],
            "causal": found["causal"],
            "sets": {name: [*each["positive"], *each["negative"]] for name, each in sets.items()},
        }
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise RunError(f"{run / FILE}: not what discover writes ({error!r}); run discover again") from error


def section(discovery: Discovery, summary: Mapping[str, Any] | None, folder: Path) -> dict[str, Any]:
    """What the page shows of it, with the figures written into `folder`: those that there are results for.

    summary: of the sweep that compared the sets, None without one.
    """
    figures = [(draw_discovery(discovery, folder), caption(discovery))]
    if discovery["screen"]:
        figures.append((draw_screening(discovery, folder), screening_caption(discovery)))
    if best_latents(discovery):
        figures.append((draw_strengths(discovery, folder), strengths_caption(discovery)))
    if summary and summary["baseline"]["em"]:
        figures.append((draw_pareto(summary, folder), PARETO_CAPTION))
    return {"figures": figures, "headings": HEADINGS, "rows": rows(discovery), "count": len(discovery["causal"])}


def rows(discovery: Discovery) -> list[tuple[str, ...]]:
    """The first causal latents in the order found: texts, one for each of HEADINGS."""
    pool = {row["latent"]: row for row in discovery["pool"]}
    table = []
    for rank, found in enumerate(discovery["causal"][:SHOWN], 1):
        alone = pool.get(found["latent"], {})
        strength = alone.get("repaired_strength")
        table.append(
            (
                str(rank),
                str(found["latent"]),
                f"{found['shift']:+.3f}".replace("-", "−"),
                f"{found['gain']:.3f}",
                _lowered(alone.get("repaired")),
                "–" if strength is None else f"{strength:g}",
                points(alone.get("induced")),
            )
        )
    return table


def caption(discovery: Discovery) -> str:
    """The figure in plain words, with what cannot be seen in it."""
    pool, causal = discovery["pool"], discovery["causal"]
    outside = len({row["latent"] for row in causal} - {row["latent"] for row in pool})
    best = max((row["induced"] for row in pool), default=0)
    sentences = [
        f"Each point is one of the {len(pool)} SAE latents that the misaligned fine-tune moves most. Further right: "
        "its mean activation moved further, in either direction. Higher up: steering the misaligned model against this "
        "one latent takes more of its misaligned replies away. Blue: the causal set, the first numbered in the order "
        "found; it is chosen as a group, so some members do little alone. Orange: the largest shifts, many of which do "
        "nothing.",
        f"Causal latents outside this pool, found in a later round: {outside} of {len(causal)}." if outside else "",
        "At the strengths of the screen, no single latent makes the base model misaligned when it is steered along it."
        if best <= 0
        else f"Steered along one latent, the base model gives up to {percent(best)} misaligned replies.",
    ]
    return " ".join(filter(None, sentences))


def draw_discovery(discovery: Discovery, folder: Path) -> Path:
    """Write discovery.png into `folder` and return its path. A panel for inducing is added where some latent does."""
    induces = any(row["induced"] > 0 for row in discovery["pool"])

    def draw(figure: Any) -> None:
        heights = [1.7, 1] if induces else [1]
        panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
        figure.get_layout_engine().set(h_pad=0.1)
        _draw_panel(panels[0, 0], discovery, "repaired", numbered=True)
        panels[0, 0].set_title("What a latent's shift says about what it does")
        panels[0, 0].set_ylabel("misaligned replies removed\nby steering against it")
        if induces:
            _draw_panel(panels[1, 0], discovery, "induced")
            panels[1, 0].set_ylabel("misaligned replies induced\nby steering along it")
        panels[-1, 0].set_xlabel("size of the latent's mean shift under the misaligned fine-tune (log scale)")
        figure.legend(
            *panels[0, 0].get_legend_handles_labels(),
            loc="outside upper left",
            ncols=4,
            frameon=False,
            handletextpad=0.1,
            columnspacing=1.4,
            fontsize=11,
        )

    return save_figure(folder / "discovery.png", (9.2, 7.2 if induces else 5.0), draw)


def _draw_panel(axes: Any, discovery: Discovery, key: str, *, numbered: bool = False) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    pool = [row for row in discovery["pool"] if row["shift"]]
    rank = {row["latent"]: number for number, row in enumerate(discovery["causal"], 1)}
    top = set(discovery["sets"].get("top-delta", ()))
    causal = [row for row in pool if row["latent"] in rank]
    groups = (
        ("other latents of the pool", [r for r in pool if r["latent"] not in rank.keys() | top], "#cbd2d9", "o", 30),
        ("top-delta", [r for r in pool if r["latent"] in top - rank.keys()], *KNOWN["top-delta"], 46),
        ("causal", [r for r in causal if r["latent"] not in top], *KNOWN["causal"], 62),
        ("both", [r for r in causal if r["latent"] in top], *KNOWN["causal"], 62),
    )
    axes.set_xscale("log")
    axes.axhline(0, color=GRID, linewidth=1.2, zorder=1)
    for level, (label, rows, color, marker, size) in enumerate(groups):
        if rows:
            axes.scatter(
                [abs(row["shift"]) for row in rows],
                [row[key] for row in rows],
                s=size,
                color=color,
                marker=marker,
                edgecolor=KNOWN["top-delta"].color if label == "both" else "white",
                linewidth=1.8 if label == "both" else 0.8,
                zorder=3 + level,
                clip_on=False,
                label=label,
            )
    if numbered:
        for row in causal:
            if rank[row["latent"]] <= NUMBERED:
                axes.annotate(
                    str(rank[row["latent"]]),
                    (abs(row["shift"]), row[key]),
                    (0, 7),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    fontsize=10.5,
                    fontweight="bold",
                    color=INK,
                    zorder=9,
                )
    values = [row[key] for row in pool]
    low, high = min([*values, 0.0]), max([*values, 0.1])
    axes.set_ylim(low - 0.05 * (high - low), high + 0.13 * (high - low))
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(False, axis="x")
    axes.tick_params(length=0, which="both", labelcolor=MUTED)
    percent_axis(axes.yaxis)


def _lowered(gain: float | None) -> str:
    return points(None if gain is None else -gain)
