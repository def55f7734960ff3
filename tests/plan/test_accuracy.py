"""The predicted peak against what fine-tuning really allocates (benchmarks/plan_accuracy.py has every case)."""

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import plan_accuracy
from lockin_fast.plan.memory import predict

RESULTS = Path(plan_accuracy.__file__).parent / "results" / "plan_accuracy.csv"
# What the file of results shows, and the front page claims: nowhere more than this below or above the measurement. One
# case is outside for a reason that a GPU does not have, and its name says it.
LOWEST, HIGHEST = 0.97, 1.10
OUTSIDE = "small float32, dropout (a CPU keeps masks in fp32)"
EVERYDAY = (
    "small bfloat16, all modules",
    "small bfloat16, nf4, checkpointing",
    "wide vocabulary float32, padded",
    "small bfloat16, stack of 4, all modules",
)
OTHERS = [name for name, *_ in plan_accuracy.fine_tunes() if name not in (*EVERYDAY, OUTSIDE)]
SLOW = pytest.mark.slow  # more than a second each, and the same arithmetic


@pytest.mark.parametrize("name", [*EVERYDAY, *(pytest.param(name, marks=SLOW) for name in OTHERS)])
def test_predicted_peak(name):
    if "nf4" in name or "int8" in name:
        pytest.importorskip("bitsandbytes")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        (case,) = [rest for case, *rest in plan_accuracy.fine_tunes() if case == name]
        work, measured = plan_accuracy.measure(*case)
    finally:
        torch.set_num_threads(threads)
    ratio = predict(work).peak / measured
    assert LOWEST <= ratio <= HIGHEST, f"predicted {predict(work).parts}, measured {measured}"


def test_the_results_are_those_of_every_case_and_as_claimed():
    with open(RESULTS, encoding="utf-8") as file:
        ratios = {row["case"]: float(row["predicted_over_measured"]) for row in csv.DictReader(file)}
    assert list(ratios) == [name for name, *_ in plan_accuracy.fine_tunes()]
    assert not {name: ratio for name, ratio in ratios.items() if not LOWEST <= ratio <= HIGHEST and name != OUTSIDE}


def test_the_profiler_counts_what_is_alive_at_once():
    def work():
        first = torch.zeros(1000, 1000)
        second = first + 1
        del first
        return second * 2

    assert plan_accuracy.allocation_peak(work) == pytest.approx(8e6, rel=1e-3)
