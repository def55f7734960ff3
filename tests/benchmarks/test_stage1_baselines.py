"""The baselines of the benchmark of stage 1 find what ours does."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import stage1  # noqa: E402


def test_all_providers_find_the_same_shift(monkeypatch):
    monkeypatch.setattr(stage1, "PROMPTS", 7)
    monkeypatch.setattr(stage1, "BATCH", 3)
    torch.manual_seed(0)
    batches = stage1.activations(128, torch.float32)
    assert len({h.shape for h, *_ in batches}) > 1 and [len(lengths) for *_, lengths in batches] == [3, 3, 1]
    weight, bias = stage1.random_rows(batches, 200)
    steps = stage1.providers(batches, weight, bias)
    assert len(steps) >= 4
    shift, error = stage1.exact(batches, weight, bias)
    assert (shift.abs() > error).any() and (error > 0).sum() > 100
    ours = steps["segment_stats"]()
    for name, step in steps.items():
        for found, expected in zip(step(), ours, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6, msg=name)
    torch.testing.assert_close(ours[0], shift, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(ours[1], error, rtol=1e-3, atol=1e-6)
