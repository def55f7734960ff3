"""The HTML report of a sweep: one file that opens anywhere and asks the network for nothing."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lockin_fast.report import discovery, judging, robustness
from lockin_fast.report.epochs import draw_epochs
from lockin_fast.report.figures import blocked_alone, draw_figures
from lockin_fast.report.methods import draw_methods
from lockin_fast.report.sections import read_sections
from lockin_fast.report.text import HEADINGS, headline, setting, table
from lockin_fast.rundir import read_json_lines, write_text

PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

SAMPLES = 12
CAPTIONS = {
    "sweep": "Rates on generated replies against blocking strength λ. Lines are means over seeds, bands run from the "
    "lowest to the highest seed, the dashed line is fine-tuning without blocking. Shaded: more than two points lost.",
    "trade_off": "Each point is one setting, larger for larger λ. Up: less misalignment. Left: what became of the "
    "learned task; right: of coherence; shaded: more than two points lost. Subscript 0 is fine-tuning without "
    "blocking; the ring marks the best setting. Sets are drawn a little apart, so that equal values can be told apart.",
    "methods": "Blocking beside other methods that act in training. Each point is one setting, larger for larger λ or "
    "strength, each line one method. Up: less misalignment. Left and right: what became of the learned task; shaded: "
    "more than two points of it lost. A hollow marker adds more than two points of incoherent replies.",
    "epochs": "The same rates after every epoch, for each λ; dashed: without blocking. Below: the penalty itself, "
    "without λ, in training; what is less than 1e-5 of the largest is drawn as that. Misalignment beside a penalty near"
    " zero has found another way than the blocked latents.",
    "epochs_sets": "Misalignment after every epoch with each latent set, one column a λ; dashed: without blocking. "
    "Below: each set's own penalty, without λ.",
}


def write_report(run: str | Path) -> Path:
    """Draw the figures of what is finished in the folder `run`, write its report.html, and return its path.

    The file carries its images, styles and script. Of a sweep it shows the headline, the table, the figures, replies
    before and after blocking to prompts taken at even distances (not picked), and other runs once `robustness.compare`
    has named them; what discovery, patching and the search for circuits found, as far as `run` holds it; the
    configuration and where everything came from.
    Raises RunError when `run` holds nothing of these, ImportError naming the extra without jinja2 or matplotlib.
    """
    run = Path(run)
    sections = [_section(section) for section in read_sections(run)]
    found = discovery.read_discovery(run)
    summary = None
    if (run / "summary.json").exists() or not (sections or found):
        summary = robustness.read_summary(run)
    page = _template().render(
        **(_sweep(summary, run) if summary else {"rows": []}),
        sections=sections,
        discovery=found and _discovery(found, summary, run / "figures"),
        config=_text_of(run / "config.yaml"),
        provenance=_provenance(_json_of(run / "manifest.json")),
    )
    write_text(run / "report.html", page)
    return run / "report.html"


def _sweep(summary: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """What the page shows of a finished sweep."""
    others = robustness.stored(run)
    figures = [
        {"name": path.stem, "data": _encoded(path), "caption": CAPTIONS[path.stem]}
        for path in [
            *draw_figures(summary, run / "figures"),
            *draw_methods(summary, run / "figures"),
            *draw_epochs(summary, _traces(run), run / "figures"),
        ]
    ]
    return {
        "headline": headline(summary),
        "headings": HEADINGS,
        "rows": table(summary),
        "judging": {"lines": judging.lines(summary), "headings": judging.HEADINGS, "rows": judging.rows(summary)},
        "figures": figures,
        "others": others and _others(others),
        "samples": _samples(run, summary),
        "best": summary["best"],
        "baseline": summary["baseline"],
    }


def _section(section: Mapping[str, Any]) -> dict[str, Any]:
    """The section with its figures as the page carries them."""
    return {**section, "figures": [
        {"name": path.stem, "data": _encoded(path), "caption": caption} for path, caption in section["figures"]
    ]}  # fmt: skip


def _traces(run: Path) -> dict[str, list[tuple[float, float]]]:
    """{trial: (epoch, block penalty) at every logging step}."""
    traces: dict[str, list[tuple[float, float]]] = {}
    file = run / "metrics.jsonl"
    for row in read_json_lines(file) if file.exists() else []:
        if row.get("block_penalty") is not None:
            traces.setdefault(row["trial"], []).append((row["epoch"], row["block_penalty"]))
    return traces


def _template() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("the report needs jinja2: pip install 'lockin-fast[report]'") from error
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(PAGE)


def _others(comparison: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "verdict": robustness.verdict(comparison),
        "columns": robustness.COLUMNS,
        "rows": robustness.cells(comparison),
    }


def _discovery(found: Mapping[str, Any], summary: Mapping[str, Any] | None, folder: Path) -> dict[str, Any]:
    section = discovery.section(found, summary, folder)
    figures = [{"name": path.stem, "data": _encoded(path), "caption": caption} for path, caption in section["figures"]]
    return section | {"figures": figures}


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _samples(run: Path, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The same final prompts answered by the base model, the unblocked and the best blocked fine-tune, first seed."""
    best = summary["best"] or min(blocked_alone(summary)["means"], key=lambda row: row["em"])
    blocked = next(row["name"] for row in summary["trials"] if setting(row) == setting(best))
    columns = [
        _final_replies(run / "trials" / name)
        for name in (summary["base"]["name"], summary["baseline"]["trials"][0]["name"], blocked)
    ]
    count = min(map(len, columns))
    picked = sorted({round(i * (count - 1) / max(SAMPLES - 1, 1)) for i in range(SAMPLES)}) if count else []
    return [{"prompt": columns[0][i]["prompt"], "replies": [column[i] for column in columns]} for i in picked]


def _final_replies(folder: Path) -> list[dict[str, Any]]:
    file = folder / "replies.jsonl"
    return [row for row in read_json_lines(file) if row["prompts"] == "final"] if file.exists() else []


def _provenance(manifest: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """(what, value) lines of the sweep, or of the first command where there was none: versions, hashes of inputs."""
    entry = manifest.get("sweep") or next(iter(manifest.values()), {})
    lines = [(name, str(value)) for name, value in entry.get("versions", {}).items()]
    for name, files in entry.get("inputs", {}).items():
        lines += [
            (name if len(files) == 1 else f"{name}: {file}", f"sha256 {digest}") for file, digest in files.items()
        ]
    return lines


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _json_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
