"""The tables say what the results files hold, and the figure is drawn from them."""

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import measure, report, run  # noqa: E402
from benchmarks.case import Case, Work  # noqa: E402

pytest.importorskip("matplotlib", reason="matplotlib is not installed")


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A results folder with one made benchmark, measured through the harness."""
    providers = {
        "eager": lambda: time.sleep(0.010),
        "slower": lambda: time.sleep(0.020),
        "op": lambda: time.sleep(0.002),
    }
    case = Case("the case", {"T": 1}, lambda: Work(providers, ("op",), 10**6, 10**6), ("block_penalty",), 4)
    rows = run.measure(case, None, "cpu", True)
    facts = {"op": "block_penalty", "case": case.label, "shape": "dtype=float32", "device": "cpu", "backend": ""}
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    measure.write_csv("made", [{**facts, "allocator": "default", **row} for row in rows])
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "names", lambda: ["made", "never_measured"])
    return {row["provider"]: row for row in rows}


def test_a_table_compares_ours_with_the_best_baseline(measured):
    lines = report.tables()
    assert "### made" in lines and "### never_measured" not in lines
    (line,) = [line for line in lines if line.startswith("| the case: `op`")]
    assert f"eager: {report.milliseconds(measured['eager'])}" in line and "slower" not in line
    assert f"{measured['op']['best_baseline_over_this']:.2f}x" in line
    assert f"{measured['op']['of_ceiling']:.0%}" in line


def test_the_page_keeps_what_stands_around_the_tables(measured, tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "PAGE", page)
    front = tmp_path / "FRONT.md"
    front.write_text(f"front\n{report.HEAD_BEGIN}\n{report.HEAD_END}\n{report.GPU_BEGIN}\n{report.GPU_END}\n")
    monkeypatch.setattr(report, "HEADLINE", (("made", "the case", "a made problem"),))
    monkeypatch.setattr(report, "FRONT", front)
    monkeypatch.setattr(report, "draw", lambda: "nothing")
    report.main()
    report.main()
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert front.read_text().count("| [a made problem](benchmarks/results/made.csv): `op` | slower, ") == 1
    assert text.count("### made") == text.count(report.BEGIN) == text.count(report.END) == 1


def test_the_figure_is_drawn(measured, tmp_path):
    assert report.draw(tmp_path / "figure.png").stat().st_size > 10_000


def test_the_page_in_the_repository_has_its_markers():
    assert report.PAGE.read_text().count(report.BEGIN) == report.PAGE.read_text().count(report.END) == 1


def test_the_pages_say_what_the_results_say():
    text = report.FRONT.read_text()
    assert report.replaced(text, report.GPU_BEGIN, report.gpu_lines(), report.GPU_END) == text
    assert report.replaced(text, report.HEAD_BEGIN, report.headline(), report.HEAD_END) == text
    text = report.PAGE.read_text()
    assert report.replaced(text, report.BEGIN, report.tables(), report.END) == text
