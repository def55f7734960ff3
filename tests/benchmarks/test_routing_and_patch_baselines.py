"""The baselines of routing_stats and patch_diff compute what ours do, or a comparison of times would mean nothing."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import patch_diff, routing_stats  # noqa: E402


def test_routing_stats():
    providers = routing_stats.work(64, 8, 2).providers
    ours = providers["routing_stats"]()
    for name in ("eager", "eager, one softmax"):
        probability, entropy, counts = providers[name]()
        torch.testing.assert_close(probability, ours.probability.float(), rtol=1e-5, atol=0)
        torch.testing.assert_close(entropy, ours.entropy_sum.float(), rtol=1e-5, atol=0)
        assert torch.equal(counts.view_as(ours.class_counts), ours.class_counts), name


def test_patch_diff():
    providers = patch_diff.work(32, 64, 20, 100).providers
    ours = providers["patch_diff"]()
    for name, tolerance in (("eager fp32", 1e-4), ("eager bf16", 3e-2), ("eager bf16, two products", 3e-2)):
        for got, expected in zip(providers[name](), ours, strict=True):
            error = (got.float() - expected).norm() / expected.norm()
            assert error < tolerance, f"{name}: {error}"
