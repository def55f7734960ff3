"""The benchmark harness: what it computes from timings, and that verify shows nothing of an op whose tests are red."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import lockin_fast  # noqa: E402
from benchmarks import measure, run, verify  # noqa: E402
from benchmarks.case import Case, Work  # noqa: E402


def made_case(**changes):
    def work():
        providers = {
            "step alone": lambda: time.sleep(0.002),
            "eager": lambda: time.sleep(0.012),
            "slower": lambda: time.sleep(0.022),
            "ours": lambda: time.sleep(0.004),
        }
        return Work(providers, ours=("ours",), bytes=10**6, **({"without": "step alone"} | changes))

    return Case("made", {"T": 1}, work, ("block_penalty",), rounds=5)


@pytest.fixture(autouse=True)
def default_device():
    yield
    torch.set_default_device(None)


def test_the_step_is_subtracted_and_the_best_baseline_is_the_yardstick():
    rows = {row["provider"]: row for row in run.measure(made_case(), None, "cpu", True)}
    assert set(rows) == {"eager", "slower", "ours"}
    assert 9 < rows["eager"]["median_ms"] < 14 and rows["ours"]["median_ms"] < 6
    ratio = rows["eager"]["median_ms"] / rows["ours"]["median_ms"]
    assert rows["ours"]["best_baseline_over_this"] == pytest.approx(ratio, rel=1e-2)
    assert rows["ours"]["ours"] == 1 and rows["eager"]["ours"] == 0
    assert all(row["low_ms"] <= row["median_ms"] <= row["high_ms"] and row["rounds"] == 5 for row in rows.values())


def test_a_bare_product_is_the_floor_and_no_baseline():
    rows = {row["provider"]: row for row in run.measure(made_case(without=None, bare="step alone"), 3, "cpu", False)}
    assert rows["ours"]["this_over_bare"] == pytest.approx(2, rel=0.4)
    assert rows["ours"]["best_baseline_over_this"] == pytest.approx(3, rel=0.4)


def test_the_ceiling_is_the_larger_of_copy_and_product():
    rows = run.measure(made_case(without=None, flops=10**9), 3, "cpu", False)
    for row in rows:
        copy = 10**6 / row["copy_gb_per_s"] / 1e9
        product = 10**9 / row["product_gflop_per_s"] / 1e9
        assert row["of_ceiling"] == pytest.approx(1e3 * max(copy, product) / row["median_ms"], rel=1e-2)


def test_peak_memory_sees_what_a_call_holds():
    assert 60e6 < measure.peak_memory(lambda: torch.ones(2**24)) < 120e6
    assert measure.peak_memory(lambda: None) < 8e6


def test_an_unknown_benchmark_is_named():
    done = subprocess.run([sys.executable, "-m", "benchmarks.run", "blok"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "unknown benchmark 'blok'; expected some of" in done.stderr


def test_no_figure_is_shown_when_the_tests_are_red(tmp_path, monkeypatch, capfd):
    (tmp_path / "test_latent_stats.py").write_text("def test_red():\n    assert False\n")
    monkeypatch.setattr(verify, "TESTS", tmp_path)
    monkeypatch.setattr(run, "run", lambda *_: pytest.fail("a figure of a red op"))
    with pytest.raises(SystemExit, match="red: latent_stats"):
        verify.main(["latent_stats"])
    assert "its tests are red, so no figure is shown" in capfd.readouterr().out


def test_every_benchmark_names_itself_and_its_cases():
    assert len(run.names()) >= 1
    for name in run.names():
        labels = [case.label for case in run.cases_of(name)]
        assert all(set(case.ops) <= {row.op for row in lockin_fast.backends()} for case in run.cases_of(name)), name
        assert labels and len(set(labels)) == len(labels), name
        assert (run.import_module(f"benchmarks.{name}").__doc__ or "").strip(), name
        assert verify.tests_of(name), f"{name}: a benchmark without tests"
