"""What the command line shows: progress, tables and error lines."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lockin_fast.doctor import Finding

SHIFTS = 15  # latents of a layer that the table of shifts has on the screen
WIDE = 110  # columns that the whole table of a sweep takes
out, err = Console(highlight=False), Console(stderr=True, highlight=False)


def line(text: str = "", **style: Any) -> None:
    """Print one line as it is: no markup, no wrapping, so that paths can be copied."""
    out.print(Text(text, **style), soft_wrap=True)


def sentence(text: str) -> None:
    """Print one bold sentence, broken between words in a terminal and left whole in a pipe."""
    out.print(Text(text, style="bold"), soft_wrap=not out.is_terminal)


def error_line(text: str) -> None:
    """Print one red-tagged line to stderr, whatever line breaks the message has."""
    _tagged("error:", "bold red", text)


def warning_line(text: str) -> None:
    """The same for what went wrong and was dealt with."""
    _tagged("warning:", "bold yellow", text)


def _tagged(tag: str, style: str, text: str) -> None:
    err.print(Text.assemble((tag, style), " ", " ".join(text.split())), soft_wrap=True)


@contextmanager
def shown_progress() -> Iterator[Any]:
    """Yield a `lockin_fast.progress.Progress`: a bar in a terminal, else one line for each finished stage."""
    with _bars() if out.is_terminal else _lines() as progress:
        yield progress


@contextmanager
def _bars() -> Iterator[Any]:
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=out) as bars:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                for finished in tasks.values():
                    bars.remove_task(finished)
                tasks.clear()
                tasks[stage] = bars.add_task(stage)
            bars.update(tasks[stage], completed=done, total=total or None)

        yield progress
        for task in tasks.values():
            bars.remove_task(task)


@contextmanager
def _lines() -> Iterator[Any]:
    started: dict[str, float] = {}

    def progress(stage: str, done: int, total: int) -> None:
        started.setdefault(stage, time.perf_counter())
        if total and done >= total and started[stage] >= 0:
            line(f"  {stage}: {time.perf_counter() - started[stage]:.1f} s")
            started[stage] = -1.0

    yield progress


def show_summary(summary: Mapping[str, Any]) -> None:
    """The table of a sweep, its best setting in bold, and the headline. A narrow terminal gets fewer columns."""
    from lockin_fast.report import judging
    from lockin_fast.report.text import HEADINGS, headline, table  # which load the kernels; doctor does not

    wide = Console(width=WIDE, highlight=False) if not out.is_terminal else out
    headings = HEADINGS if wide.width >= WIDE else HEADINGS[:-3]
    grid = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        grid.add_column(heading, justify="left" if heading == "latents" else "right", no_wrap=True)
    for row in table(summary):
        grid.add_row(*row.cells[: len(headings)], style="bold green" if row.best else None)
    line()
    wide.print(grid)
    line()
    sentence(headline(summary))
    for told in judging.lines(summary):
        line(f"judges: {told}")
    if dropped := summary.get("data", {}).get("train_rows_dropped"):
        line(f"note: {dropped} training rows were left out: nothing supervised within train.max_length tokens")


def show_comparison(comparison: Mapping[str, Any]) -> None:
    """The table of a run beside others, its columns in groups, and the mean of the others in a sentence.

    A terminal too narrow for the table cuts its lines; the report has it whole.
    """
    from lockin_fast.report import robustness

    names = [name for _, group in robustness.COLUMNS for name in group]
    rows = [names, *robustness.cells(comparison)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    groups, lines, column = "", ["" for _ in rows], 0
    for group, members in robustness.COLUMNS:
        groups = groups.ljust(len(lines[0]) + 2) + group if group else groups
        for number in range(column, column + len(members)):
            gap = 0 if not number else 2 if number == column else 1
            pad = str.rjust if number else str.ljust
            lines = [text + " " * gap + pad(row[number], widths[number]) for text, row in zip(lines, rows, strict=True)]
        column += len(members)
    line()
    for number, text in enumerate([groups, *lines]):
        style = "bold" if number in (0, 1, len(rows)) else ""
        fit = {"no_wrap": True, "overflow": "ellipsis"} if out.is_terminal else {"soft_wrap": True}
        out.print(Text(text, style=style), **fit)
    line()
    sentence(robustness.verdict(comparison))


def show_findings(findings: Sequence[Finding]) -> None:
    """The diagnosis of `doctor`, under its headings."""
    width = max(len(finding.name) for finding in findings)
    heading = None
    for finding in findings:
        if finding.heading != heading:
            heading = finding.heading
            line()
            line(heading, style="bold")
        tag = ("error: ", "bold red") if finding.error else ""
        out.print(Text.assemble(f"  {finding.name:<{width}}  ", tag, finding.value), soft_wrap=True)


def show_plan(plan: Any) -> None:
    """The parts of the peak and of a step, the verdict, and what to change, as tables."""
    memory, usable = plan.memory, plan.device.usable
    grid = _grid("memory at the peak", "GiB")
    for name, size in memory.parts.items():
        grid.add_row(f"{name} ({memory.working})" if name == "working set" else name, _gib(size))
    grid.add_row("peak", _gib(memory.peak), style="bold")
    grid.add_row(f"usable of {plan.device.name}", _gib(usable))
    if memory.disk:
        grid.add_row("on disk, a million tokens", _gib(memory.disk))
    line()
    out.print(grid)
    line()
    timed = plan.seconds is not None
    grid = _grid("a step of the whole batch", "TFLOP", "GB moved", *(["seconds"] if timed else []))
    for part in plan.steps:
        seconds = [f"{part.seconds(plan.device):,.3f}"] if timed else []
        grid.add_row(part.name, f"{part.flops / 1e12:,.2f}", f"{part.bytes / 1e9:,.1f}", *seconds)
    if timed:
        grid.add_row("all, one after the other", "", "", f"{plan.seconds:,.3f}", style="bold")
    out.print(grid)
    line(
        f"rates: {plan.device.source}; an estimate for comparing configurations"
        if timed
        else "no rates are known of this device: name a GPU, give --flops and --bandwidth, or --measure them"
    )
    line()
    spare = usable - memory.peak
    sentence(
        f"It fits: {_gib(spare)} GiB to spare."
        if plan.fits
        else f"It does not fit: {_gib(-spare)} GiB more than there is."
    )
    if plan.suggestions:
        line()
        grid = _grid("change, cheapest first", "alone", "with those above")
        for change in plan.suggestions:
            sizes = [
                f"{_gib(size)}{' fits' if size <= usable else '     '}" for size in (change.alone, change.together)
            ]
            grid.add_row(change.setting, *sizes)
        out.print(grid)
    if not plan.fits and (not plan.suggestions or plan.suggestions[-1].together > usable):
        sentence("Nothing here makes it fit: take a smaller model, shorter rows or a larger GPU.")


def _grid(first: str, *numbers: str) -> Table:
    grid = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    grid.add_column(first, no_wrap=True)
    for heading in numbers:
        grid.add_column(heading, justify="right", no_wrap=True)
    return grid


def _gib(count: float) -> str:
    return f"{count / 2**30:,.2f}"


def show_values(values: Mapping[str, Any]) -> None:
    """Names and values below each other."""
    width = max(map(len, values))
    for name, value in values.items():
        line(f"  {name:<{width}}  {f'{value:.4g}' if isinstance(value, float) else value}")


def show_shift(table: Path) -> None:
    """The latents that the fine-tune shifts most, layer by layer, and where the whole table is."""
    from lockin_fast.discovery.shift_table import read_largest

    numbers = ("shift", "error", "t", "token_shift", "token_error", "token_t", "rate_base", "rate_tuned")
    for layer, rows in read_largest(table, SHIFTS).items():
        grid = _grid(f"layer {layer}: latent", "shift", "error", "t", "by token", "error", "t", "active", "fine-tuned")
        for row in rows:
            grid.add_row(str(row["latent"]), *("–" if row[n] is None else f"{row[n]:.3g}" for n in numbers))
        line()
        (out if out.is_terminal else Console(width=WIDE, highlight=False)).print(grid)
    line()
    line("shift: mean over prompts of the mean over tokens; error: over prompts; by token: every token alike")
    line(f"table:   {table}")


def show_prescreen(run: Path) -> None:
    """How well attribution, and the size of the shift, foretold the screen of a discovery; nothing without one."""
    from lockin_fast.discovery.run import TABLE

    found = json.loads((run / TABLE).read_text(encoding="utf-8")).get("prescreen")
    if not found:
        return
    grid = _grid("foretold by", "of", "rank correlation", "best found", "by chance")
    for name, sides in found["agreement"].items():
        for side, agreed in sides.items():
            rates = (agreed["overlap"], agreed["chance"])
            shares = ["–" if rate is None else f"{rate:.0%}" for rate in rates]
            grid.add_row(name, side, "–" if agreed["spearman"] is None else f"{agreed['spearman']:+.2f}", *shares)
    line()
    (out if out.is_terminal else Console(width=WIDE, highlight=False)).print(grid)
    line(f"over the {len(found['latents'])} latents of the pool, chosen by {found['pool_by']}, against steering")


def show_cache(summary: Mapping[str, Any]) -> None:
    """What a cache holds, and the noise of each latent set."""
    show_values({name.replace("_", " "): value for name, value in summary.items() if name != "sets"})
    if not summary["sets"]:
        return
    grid = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("latents", "K", "sigma, median", "largest", "lambda up to"):
        grid.add_column(heading, justify="left" if heading == "latents" else "right", no_wrap=True)
    for row in summary["sets"]:
        numbers = (row["sigma_median"], row["sigma_max"], row["largest_lambda"])
        grid.add_row(row["latents"], str(row["count"]), *(f"{number:.2g}" for number in numbers))
    line()
    (out if out.is_terminal else Console(width=WIDE, highlight=False)).print(grid)
    line("sigma: error of an active latent; lambda up to: where its noise alone would cost a loss of 0.01")


def show_patching(found: Mapping[str, Any]) -> None:
    """For each direction a table of layers by positions, then what stands out. A narrow terminal cuts its lines."""
    from lockin_fast.report import patching

    wide = out if out.is_terminal else Console(width=WIDE, highlight=False)
    for table in patching.grids(found):
        line()
        line(table["title"], style="bold")
        line(table["note"])
        wide.print(_table(table["headings"], table["rows"]))
    if found["latents"]:
        line()
        wide.print(_table(patching.LATENT_HEADINGS, patching.latent_rows(found)))
    if told := patching.agreements(found):
        line()
        line("attribution patching against what was measured, over sites")
        wide.print(_table(patching.AGREEMENT_HEADINGS, told))
    if said := patching.headline(found):
        line()
        sentence(said)


def show_measured(found: Mapping[str, Any]) -> None:
    """A row for every checkpoint, then the onset of each series, the triggers, and what is odd about the run."""
    from lockin_fast.report import lockin

    wide = out if out.is_terminal else Console(width=WIDE, highlight=False)
    headings, rows = lockin.table(found)
    line()
    wide.print(_table(headings, rows))
    for told in lockin.failures(found):
        line(told)
    line()
    for told in lockin.onsets(found):
        line(told)
    for told in lockin.verdicts(found):
        line(told)
    for anomaly in found["anomalies"]:
        warning_line(anomaly)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    grid = _grid(headings[0], *headings[1:])
    for row in rows:
        grid.add_row(*row)
    return grid


def show_run(run: Path) -> None:
    """Where the report and the figures of a run are."""
    line(f"report:  {run / 'report.html'}")
    for figure in sorted((run / "figures").glob("*.png")):
        line(f"figure:  {figure}")
