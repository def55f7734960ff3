"""The figures and sentences about attention heads, and their place in a run's report."""

import json
import math

import pytest
from made_run import made_run

from lockin_fast.report import write_report
from lockin_fast.report.circuits import captions, draw_circuits, onset, read_circuits, verdict
from lockin_fast.rundir import RunError

PREFIX = [[0.02, 0.30], [0.05, 0.93], [0.61, 0.01]]


def made_circuits():
    def row(threshold, heads, recovery=None, random=None):
        error = None if recovery is None else 0.02
        return {"threshold": threshold, "heads": heads, "recovery": recovery, "error": error, "random": random}

    random = {"mean": 0.01, "low": -0.02, "high": 0.05, "draws": 20}
    return {
        "layers": 3, "heads": 2, "length": 50, "sequences": 8, "seeds": [0, 1], "prefix": PREFIX, "error": PREFIX,
        "copying": [[0.1, -0.4], [0.2, 0.9], [None, 0.3]], "copying_folded": [[0.1, -0.4], [0.2, 0.8], [None, 0.3]],
        "gain": 2.5, "gain_error": 0.1,
        "thresholds": [
            row(0.1, [[0, 1], [1, 1], [2, 0]], 0.97), row(0.5, [[1, 1], [2, 0]], 0.9, random), row(0.95, []),
        ],
        "onset": [
            {"step": step, "prefix": [[s / (1 + math.exp(4 - step / 50)) for s in of] for of in PREFIX], "gain": 0.1}
            for step in (0, 100, 200, 300, 400)
        ],
    }  # fmt: skip


def flat_circuits():
    """A model without induction heads, and one whose copying could not be read."""
    found = made_circuits()
    for row in found["thresholds"]:
        row |= {"heads": [], "recovery": None, "error": None, "random": None}
    return found | {
        "prefix": [[0.01, 0.02], [0.03, 0.04], [0.05, 0.06]], "copying": None, "copying_folded": None, "gain": -0.03,
        "onset": [],
    }  # fmt: skip


def test_figures_are_those_there_is_something_for(tmp_path):
    paths = draw_circuits(made_circuits(), tmp_path)
    assert [path.name for path in paths] == ["heads.png", "recovery.png", "onset.png"]
    assert set(captions(made_circuits())) == {path.stem for path in paths}
    sizes = [path.stat().st_size for path in paths]
    assert min(sizes) > 10_000
    flat = draw_circuits(flat_circuits(), tmp_path / "flat")
    assert [path.name for path in flat] == ["heads.png"]
    assert "norms folded" in captions(made_circuits())["heads"] and "norms" not in captions(flat_circuits())["heads"]


def test_sentences():
    assert verdict(made_circuits()) == (
        "2 of 6 heads score 0.5 or more on prefix matching; the highest is head 1 of layer 1 with 0.93. Together they "
        "bring back 90.0% of what the first copy is worth, as many random heads 1.0% (−2.0% to 5.0%)."
    )
    assert verdict(flat_circuits()) == (
        "No head reaches the lowest threshold of prefix matching: the highest is head 1 of layer 2 with 0.06. The "
        "first copy adds −0.03 nats to the log-probability of the second."
    )
    assert onset(made_circuits()) == "A head first reaches 0.5 at step 300."
    assert onset(flat_circuits()) == "No head reaches 0.5 at any checkpoint."


def test_a_run_without_circuits_has_none(tmp_path):
    assert read_circuits(tmp_path) is None
    for text in ("{}", "no json", "[]"):
        (tmp_path / "circuits.json").write_text(text)
        with pytest.raises(RunError, match="circuits.json: not what the circuits of a run are kept as"):
            read_circuits(tmp_path)


def test_the_report_of_a_run_shows_its_circuits(tmp_path):
    made_run(tmp_path, seeds=1)
    assert "Attention heads" not in write_report(tmp_path).read_text()
    (tmp_path / "circuits.json").write_text(json.dumps(made_circuits()))
    page = write_report(tmp_path).read_text()
    assert "Attention heads" in page and "2 of 6 heads score 0.5 or more" in page
    assert all((tmp_path / "figures" / f"{name}.png").is_file() for name in ("heads", "recovery", "onset"))
