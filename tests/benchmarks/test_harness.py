"""The benchmark harness: what it computes from timings, and that verify shows nothing of an op whose tests are red."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import lockin_fast  # noqa: E402
from benchmarks import measure, run, verify  # noqa: E402
from benchmarks.case import Case, Work  # noqa: E402
from benchmarks.measure import Timing  # noqa: E402

SECONDS = {"step alone": 0.002, "eager": 0.012, "slower": 0.022, "ours": 0.004}


def made_case(**changes):
    providers = dict.fromkeys(SECONDS, lambda: None)
    facts = {"without": "step alone"} | changes
    return Case("made", {"T": 1}, lambda: Work(providers, ("ours",), 10**6, **facts), ("block_penalty",), rounds=5)


@pytest.fixture
def made_times(monkeypatch):
    """Every provider takes what SECONDS says, whatever else the machine does; a copy of anything takes 1 ms."""

    def timed(steps, rounds, *_):
        assert set(steps) == {*SECONDS, run.CEILING}
        return {name: Timing(s, 0.9 * s, 1.1 * s, rounds) for name in steps for s in [SECONDS.get(name, 0.001)]}

    monkeypatch.setattr(run, "interleaved", timed)


@pytest.fixture(autouse=True)
def default_device():
    yield
    torch.set_default_device(None)


def test_the_step_is_subtracted_and_the_best_baseline_is_the_yardstick(made_times):
    rows = {row["provider"]: row for row in run.measure(made_case(), None, "cpu", True)}
    assert {name: row["median_ms"] for name, row in rows.items()} == {"eager": 10.0, "slower": 20.0, "ours": 2.0}
    assert rows["ours"]["best_baseline_over_this"] == 5.0
    assert rows["ours"]["low_ms"] == pytest.approx(1.6) and rows["ours"]["high_ms"] == pytest.approx(2.4)
    assert rows["ours"]["ours"] == 1 and rows["eager"]["ours"] == 0 and rows["ours"]["rounds"] == 5


def test_a_bare_product_is_the_floor_and_no_baseline(made_times):
    rows = {row["provider"]: row for row in run.measure(made_case(without=None, bare="step alone"), 3, "cpu", False)}
    assert rows["ours"]["this_over_bare"] == 2.0
    assert rows["ours"]["best_baseline_over_this"] == 3.0
    assert rows["ours"]["rounds"] == 3


def test_the_ceiling_is_the_larger_of_copy_and_product(made_times, monkeypatch):
    # The copy reads and writes 0.5 MB in 1 ms.
    (copied, *_) = [row for row in run.measure(made_case(without=None), 3, "cpu", False) if row["ours"]]
    assert copied["copy_gb_per_s"] == 1.0 and copied["of_ceiling"] == 0.25
    monkeypatch.setattr(run, "product_rate", lambda *_: 10**12)
    work = made_case(without=None, flops=3 * 10**9)
    (multiplied, *_) = [row for row in run.measure(work, 3, "cpu", False) if row["ours"]]
    assert multiplied["product_gflop_per_s"] == 1000.0 and multiplied["of_ceiling"] == 0.75


def test_providers_take_turns_and_warm_up():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = measure.interleaved(steps, rounds=4, warmup=1)
    assert len(calls) == 5 * 3 and {name: timing.runs for name, timing in timings.items()} == dict.fromkeys("abc", 4)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert all(sorted(turn) == list("abc") for turn in rounds) and len(set(rounds)) == 3


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
