"""The baselines of the full-width ops compute what ours do, or a comparison of times would mean nothing."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import encode_topk, latent_stats  # noqa: E402


def small(module, monkeypatch, **sizes):
    for name, size in ({"TOKENS": 9, "WIDTH": 48} | sizes).items():
        monkeypatch.setattr(module, name, size)


@pytest.mark.parametrize("streams", [1, 2])
def test_latent_stats(streams, monkeypatch):
    small(latent_stats, monkeypatch)
    providers = latent_stats.work(300, torch.float32, streams).providers
    ours, eager = providers["latent_stats"](), providers["encode everything"]()
    assert ours.count.any()
    counts = [ours.count, ours.count_ref][:streams]
    for found, expected in zip((ours.sum, ours.sum_squares, *counts), eager, strict=True):
        torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-4, atol=1e-5)


def test_encode_topk(monkeypatch):
    small(encode_topk, monkeypatch, KEPT=2)
    providers = encode_topk.work(3000, torch.float32).providers
    ours, eager = providers["encode_topk"](), providers["encode everything"]()
    assert (ours.values > 0).all()
    torch.testing.assert_close(ours.values, eager.values)
    assert torch.equal(ours.indices, eager.indices)
