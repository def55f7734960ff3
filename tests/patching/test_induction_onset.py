"""Induction begins where it has to be learned, in one step of the thresholds, and the heads flagged do all of it."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.induction_onset import grow_control, look, repeating  # noqa: E402


def test_nothing_but_induction_tells_what_comes_next():
    tokens = repeating()
    distances = set()
    for row in tokens[:, 1:].tolist():
        distance = row.index(row[0], 1)
        assert row[distance:] == row[:-distance] and len(set(row)) == distance
        distances.add(distance)
    assert (tokens[:, 0] == 0).all() and len(distances) > 10


@pytest.mark.slow  # trains a model of two layers for 400 steps
def test_onset_of_a_training(tmp_path):
    grow_control(tmp_path / "checkpoints", steps=400, every=50)
    last = tmp_path / "checkpoints" / "step-000400"
    rows = look("control", last, tmp_path / "checkpoints", tmp_path / "run", 24)
    assert [row["step"] for row in rows] == list(range(0, 401, 50))
    assert max(row["highest"] for row in rows[:2]) < 0.1 and rows[-1]["highest"] > 0.8
    assert rows[-1]["gain_nats"] > 1 and rows[-1]["recovery"] > 0.9 and rows[-1]["random_high"] < 0.3
    assert (tmp_path / "run" / "figures" / "onset.png").is_file() and torch.get_num_threads() == 1
