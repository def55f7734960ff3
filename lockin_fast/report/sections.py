"""What a run folder holds beside a sweep, as sections of its report."""

from pathlib import Path
from typing import Any

from lockin_fast.report import circuits, lockin, patching
from lockin_fast.report.lockin_figure import draw_lockin
from lockin_fast.report.patching_figures import draw_patching


def read_sections(run: Path) -> list[dict[str, Any]]:
    """A section for each kind of result in `run`, its figures drawn into `run`/figures:

    {"title", "lead", "figures": [(path, caption)], "tables": [{"title", "note", "headings", "rows", "folded"}]}.
    """
    return [section for read in (_patching, _circuits, _lockin) if (section := read(run))]


def _patching(run: Path) -> dict[str, Any] | None:
    found = patching.read_patching(run)
    if found is None:
        return None
    tables = [table | {"folded": False} for table in patching.grids(found)]
    if latents := patching.latent_rows(found):
        tables.append(
            {
                "title": "Which latents carry the difference",
                "note": "misaligned − base, means over tokens; in parentheses the change of the latent",
                "headings": patching.LATENT_HEADINGS,
                "rows": latents,
                "folded": True,
            }
        )
    if told := patching.agreements(found):
        tables.append(
            {
                "title": "How well attribution patching foretells it",
                "note": "Spearman's rank correlation over sites of its estimate with the change that was measured",
                "headings": patching.AGREEMENT_HEADINGS,
                "rows": told,
                "folded": True,
            }
        )
    every = {"title": "Every patch", "note": "", "headings": patching.HEADINGS, "rows": patching.rows(found)}
    captions = patching.captions(found)
    return {
        "title": "Where it lives: activation patching",
        "lead": patching.headline(found),
        "figures": [(path, captions[path.stem]) for path in draw_patching(found, run / "figures")],
        "tables": [*tables, every | {"folded": True}],
    }


def _circuits(run: Path) -> dict[str, Any] | None:
    found = circuits.read_circuits(run)
    if found is None:
        return None
    captions = circuits.captions(found)
    figures = [(path, captions[path.stem]) for path in circuits.draw_circuits(found, run / "figures")]
    return {"title": "Attention heads", "lead": circuits.verdict(found), "figures": figures, "tables": []}


def _lockin(run: Path) -> dict[str, Any] | None:
    found = lockin.read_lockin(run)
    if found is None:
        return None
    headings, rows = lockin.table(found)
    failed = "; ".join(lockin.failures(found))
    return {
        "title": "Lock-in over checkpoints",
        "lead": lockin.headline(found),
        "figures": [(draw_lockin(found, run / "figures"), lockin.CAPTION)],
        "tables": [
            {"title": "When it changed", "note": "", "headings": lockin.ONSET_HEADINGS,
             "rows": lockin.onset_rows(found), "folded": False},
            {"title": "Triggers", "note": "", "headings": lockin.TRIGGER_HEADINGS,
             "rows": lockin.trigger_rows(found), "folded": False},
            {"title": "Every checkpoint", "note": failed, "headings": headings, "rows": rows, "folded": True},
        ],
    }  # fmt: skip
