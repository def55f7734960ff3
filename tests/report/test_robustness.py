"""A run beside others: the rows are what the summaries say, and the mean leaves out the run itself."""

import json

import pytest
from made_run import made_run, made_summary

from lockin_fast.report import compare, stored, write_report
from lockin_fast.report.robustness import COLUMNS, cells, verdict
from lockin_fast.rundir import RunError


@pytest.fixture
def runs(tmp_path):
    """Three runs: `first`, the organism of a demo; `second`; and `third`, where the causal set does less."""
    folders = [tmp_path / name for name in ("first", "second", "third")]
    for folder in folders:
        folder.mkdir()
        made_run(folder, seeds=2)
    (folders[0] / "organism").mkdir()
    (folders[0] / "organism" / "organism.json").write_text(json.dumps({"seed": 4}))
    summary = made_summary(seeds=2)
    summary["best_per_set"]["causal"] |= {"em": 0.2, "em_reduction": 0.6, "incoherence_change": 0.04, "lambda": 1.0}
    del summary["best_per_set"]["top-delta"]
    (folders[2] / "summary.json").write_text(json.dumps(summary))
    return folders


def test_rows_are_what_the_summaries_say_and_the_mean_is_of_the_others(runs):
    found = compare(runs[0], runs[1:])
    assert json.loads((runs[0] / "robustness.json").read_text()) == found == stored(runs[0])
    summary = json.loads((runs[0] / "summary.json").read_text())
    own, (second, third), mean = found["run"], found["others"], found["average_of_others"]
    assert (own["name"], own["organism"], own["seeds"], second["organism"]) == ("first", 4, [0, 1], None)
    assert [own[key] for key in ("em", "incoherence", "in_domain")] == [
        summary["baseline"][key] for key in ("em", "incoherence", "in_domain")
    ]
    best = summary["best_per_set"]
    assert own["causal_lambda"] == best["causal"]["lambda"]
    assert own["causal_reduction"] == best["causal"]["em_reduction"]
    assert (own["top_delta_em"], own["random_em"]) == (best["top-delta"]["em"], best["random"]["em"])
    assert mean["causal_em"] == pytest.approx((second["causal_em"] + 0.2) / 2) and third["causal_lambda"] == 1.0
    assert mean["causal_reduction"] == pytest.approx((second["causal_reduction"] + 0.6) / 2)
    assert third["top_delta_em"] is None and mean["top_delta_em"] == second["top_delta_em"]


def test_the_table_and_the_sentence_show_the_rows(runs):
    found = compare(runs[0], runs[1:])
    table = cells(found)
    assert {len(row) for row in table} == {sum(len(names) for _, names in COLUMNS)}
    assert [row[0] for row in table] == ["first, organism 4", "second", "third", "mean of the others"]
    assert table[2][5:10] == ("1", "20.0%", "60.0%", table[1][8], "+4.0") and table[2][10] == "–"
    assert "over the 2 other runs" in verdict(found) and f"cut of {table[3][7]}" in verdict(found)
    assert verdict(compare(runs[0], runs[1:2])).startswith("In the other run")


def test_the_report_keeps_the_comparison_with_this_runs_newest_numbers(runs):
    assert "Other organisms and runs" not in write_report(runs[0]).read_text()
    compare(runs[0], runs[1:])
    summary = made_summary(seeds=2)
    summary["baseline"]["em"] = 0.4321
    (runs[0] / "summary.json").write_text(json.dumps(summary))
    text = write_report(runs[0]).read_text()
    assert "Other organisms and runs" in text and "<td>third</td>" in text
    row = text[text.index("<td>first, organism 4</td>") :].split("</tr>")[0]
    assert ">43.2%<" in row
    assert json.loads((runs[0] / "robustness.json").read_text())["run"]["em"] == 0.4321


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no summary.json"), ("{", "not valid JSON"), ("[3]", "not the summary"), ("{}", "not the summary")],
)
def test_a_run_that_is_no_finished_sweep_is_one_line_and_writes_nothing(runs, content, message):
    (runs[2] / "summary.json").unlink()
    if content is not None:
        (runs[2] / "summary.json").write_text(content)
    with pytest.raises(RunError, match=message) as error:
        compare(runs[0], runs[1:])
    assert str(runs[2]) in str(error.value) and "\n" not in str(error.value)
    assert not (runs[0] / "robustness.json").exists()


def test_a_run_beside_itself_and_a_damaged_comparison_are_errors(runs):
    with pytest.raises(RunError, match="named twice"):
        compare(runs[0], [runs[1], runs[0] / ".." / "first"])
    (runs[0] / "robustness.json").write_text('{"others": 3')
    with pytest.raises(RunError, match="robustness.json: cannot be read"):
        write_report(runs[0])
