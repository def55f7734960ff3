"""The default backend of an op on a GPU is what the results files say, and nothing else."""

import csv
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import gpu_defaults  # noqa: E402


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def measured(backend, op, case, milliseconds, ours="1"):
    return {
        "op": op, "case": case, "shape": "T=1", "provider": "p", "backend": backend, "gpu": "G", "ours": ours,
        "median_ms": milliseconds,
    }  # fmt: skip


@pytest.fixture
def results(tmp_path):
    write(
        tmp_path / "gpu_benchmarks.csv",
        [
            measured("triton", "patch_ patch_nf4_", "small", 2.0), measured("cuda", "patch_ patch_nf4_", "small", 1.0),
            measured("triton", "patch_", "large", 2.0), measured("cuda", "patch_", "large", 3.0),
            measured("triton", "patch_", "eager", 0.1, ours="0"),
            measured("triton", "steer_", "one", 1.0), measured("cuda", "steer_", "one", 2.0),
            measured("triton", "encode_topk", "one", 1.0),
        ],
    )  # fmt: skip
    return tmp_path


def test_the_faster_backend_over_the_shared_cases_is_chosen(results):
    chosen = gpu_defaults.compute(results)
    assert {op: row["backend"] for op, row in chosen.items()} == {
        "patch_": "cuda", "patch_nf4_": "cuda", "steer_": "triton"
    }  # fmt: skip
    assert {row["measured"] for row in chosen.values()} == {"gpu_benchmarks.csv"}


def test_a_backend_whose_tests_failed_is_not_chosen(results):
    rows = [
        {"op": "patch_", "backend": "cuda", "tests": "failed"},
        {"op": "steer_", "backend": "cuda", "tests": "passed"},
    ]
    write(results / "gpu_tests.csv", rows)
    assert set(gpu_defaults.compute(results)) == {"patch_nf4_", "steer_"}


def test_nothing_measured_is_nothing_chosen(tmp_path):
    assert gpu_defaults.compute(tmp_path) == {}


def test_the_file_in_the_package_is_what_the_results_say():
    assert json.loads(gpu_defaults.DEFAULTS.read_text()) == gpu_defaults.compute()
