"""What patching found, for the report and the terminal: layers x positions as pictures, every site as a row."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lockin_fast.report.text import percent, points
from lockin_fast.rundir import RunError

FILE = "patching.json"
TITLES = {
    "repair": "repair: the base's states in the misaligned model",
    "induce": "induce: the misaligned model's states in the base",
}
TARGETS = {"repair": ("misaligned", "base"), "induce": ("base", "misaligned")}  # (patched side, source of the states)
HEADINGS = (
    "direction", "component", "positions", "layer", "misaligned", "change", "incoherent", "log-probabilities, nats",
    "moved to the source", "attribution",
)  # fmt: skip
AGREEMENT_HEADINGS = ("direction", "component", "sites", "rank correlation")
LATENT_HEADINGS = ("layer", "positions", "norm of the difference", "latents that change most")

Patching = Mapping[str, Any]


def read_patching(run: Path) -> dict[str, Any] | None:
    """What `lockin-fast patch` left in `run`; None where it left nothing. Raises RunError for anything else there."""
    if not (run / FILE).exists():
        return None
    try:
        found = json.loads((run / FILE).read_text(encoding="utf-8"))
        headline(found), rows(found), latent_rows(found), agreements(found)
        return found
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{run / FILE}: not what patch writes ({error!r}); run patch again") from error


def headline(found: Patching) -> str:
    """The strongest patch of the residual stream in each direction, and how far the prompt carries it, in sentences."""
    sentences = [_strongest(found, direction) for direction in TITLES]
    return " ".join(filter(None, [*sentences, _upstream(found)]))


def _upstream(found: Patching) -> str:
    """Whether patching the prompt repairs more in the lower half of the layers, as in BLOCK-EM, arXiv 2602.00767."""
    sites = [row for row in sites_of(found, "repair", "residual") if row["positions"] == "prefix"]
    if len(sites) < 2 or any(row["misaligned"] is None for row in sites):
        return ""
    sites = sorted(sites, key=lambda row: row["layer"])
    half = len(sites) // 2
    lower, upper = (sum(row["misaligned"] for row in part) / len(part) for part in (sites[:half], sites[half:]))
    how = "as much as" if lower == upper else "more than" if lower < upper else "less than"
    return (
        f"In the prompt alone, patches of the lower half of the layers repair {how} those of the upper: "
        f"{percent(lower)} stay misaligned against {percent(upper)}."
    )


def _strongest(found: Patching, direction: str) -> str:
    sites = [row for row in found["sites"] if row["direction"] == direction and row["component"] == "residual"]
    target, source = TARGETS[direction]
    before = found["clean"][target]["misaligned"]
    judged = [row for row in sites if row["misaligned"] is not None]
    verb = "repairs" if direction == "repair" else "induces"
    if judged and before is not None:
        sign = 1 if direction == "repair" else -1
        best = min(judged, key=lambda row: sign * row["misaligned"])
        if sign * (before - best["misaligned"]) <= 0:
            return f"No patch {verb} anything: {percent(before)} of the {target} model's replies stay misaligned."
        return (
            f"{_place(best)} {verb} most: the {target} model's misaligned replies go from {percent(before)} to "
            f"{percent(best['misaligned'])} (the {source} model: {percent(found['clean'][source]['misaligned'])})."
        )
    moved = [row for row in sites if row["recovery"] is not None]
    if not moved:
        return ""
    best = max(moved, key=lambda row: row["recovery"])
    return f"{_place(best)} {verb} most: {percent(best['recovery'])} of the way between the two in log-probabilities."


def _place(row: Mapping[str, Any]) -> str:
    what = {"all": "Patching all positions", "generated": "Patching the generated tokens", "last": "Patching the last "
            "prompt token", "prefix": "Patching the prompt"}.get(row["positions"])  # fmt: skip
    return f"{what or 'Patching positions ' + row['positions']} at layer {row['layer']}"


def rows(found: Patching) -> list[tuple[str, ...]]:
    """Every site: texts, one for each of HEADINGS."""
    table = []
    for row in found["sites"]:
        before = found["clean"][TARGETS[row["direction"]][0]]["misaligned"]
        change = None if row["misaligned"] is None else row["misaligned"] - before
        component = row["component"] if row["head"] is None else f"head {row['head']}"
        table.append(
            (
                row["direction"],
                component,
                row["positions"],
                str(row["layer"]),
                percent(row["misaligned"]),
                points(change),
                percent(row["incoherent"]),
                signed(row["difference"]),
                percent(row["recovery"]),
                signed(row["attribution"]),
            )
        )
    return table


def grids(found: Patching) -> list[dict[str, Any]]:
    """The residual stream's sites as a table for each direction: {"title", "note", "headings", "rows"}."""
    tables = []
    for direction, title in TITLES.items():
        sites = {(row["layer"], row["positions"]): row for row in sites_of(found, direction, "residual")}
        if not sites:
            continue
        layers, positions = (list(dict.fromkeys(key[i] for key in sites)) for i in (0, 1))
        target, source = (found["clean"][side] for side in TARGETS[direction])
        note = (
            "Misaligned replies, and log p(misaligned reply) − log p(aligned reply) in nats; "
            f"unpatched {_cell(target)}, the source by itself {_cell(source)}"
        )
        lines = [(str(layer), *(_cell(sites[layer, name]) for name in positions)) for layer in layers]
        tables.append({"title": title, "note": note, "headings": ("layer", *positions), "rows": lines})
    return tables


def _cell(row: Mapping[str, Any]) -> str:
    """Misaligned share of the replies, and log-probability of misaligned over aligned replies."""
    return f"{percent(row['misaligned'])}  {signed(row['difference'])}"


def latent_rows(found: Patching) -> list[tuple[str, ...]]:
    """Which latents carry the difference of the sides: texts, one for each of LATENT_HEADINGS; none where not asked."""
    return [
        (
            str(row["layer"]),
            row["positions"],
            f"{row['norm']:.3g}",
            ", ".join(f"{one['latent']} ({signed(one['change'])})" for one in row["latents"] if one["change"]) or "–",
        )
        for row in found["latents"] or ()
    ]


def agreements(found: Patching) -> list[tuple[str, ...]]:
    """How far attribution patching ranks the sites as patching does: texts, one for each of AGREEMENT_HEADINGS."""
    return [
        (row["direction"], row["component"], str(row["sites"]), signed(row["rank_correlation"]))
        for row in found["agreement"]
    ]


def captions(found: Patching) -> dict[str, str]:
    """{stem of the figure's file: the figure in plain words, with what cannot be seen in it}."""
    judged = any(row["misaligned"] is not None for row in found["sites"])
    patch = (
        "Each cell is a patch: at this layer, the states at these positions are those that the other model has on the "
        "same tokens. prefix: the whole prompt; last: its last token; generated: every token of the reply as it is "
        "generated; all: both."
    )
    left = f"Left: misaligned replies, {found['prompts']} prompts, {found['replies']} a prompt and patch. Right: h"
    moved = (
        "ow much of the difference between the two models in log p(misaligned reply) − log p(aligned reply) the patch "
        f"moves, over {found['contrasts']} pairs of replies that are only read; in nats where the models do not surely "
        "differ."
    )
    parts = (
        "The same for what attention and MLP of a layer put out, and for single heads, at the positions where a head "
        "moves most."
    )
    return {"patching": f"{patch} {left if judged else 'H'}{moved}", "patching_components": parts}


def sites_of(found: Patching, direction: str, component: str) -> list[Mapping[str, Any]]:
    """The rows of these sites, in their order."""
    return [row for row in found["sites"] if (row["direction"], row["component"]) == (direction, component)]


def signed(value: float | None) -> str:
    """A number with its sign, the real one."""
    return "–" if value is None else f"{value:+.2f}".replace("-", "−")
