"""The baselines of the measurement ops compute what ours do, or a comparison of times would mean nothing."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import js_divergence, prefix_matching  # noqa: E402


def agree(providers):
    results = {name: provider() for name, provider in providers.items()}
    for result in results.values():
        torch.testing.assert_close(result, next(iter(results.values())), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_js_divergence(dtype):
    agree(js_divergence.providers((3 * torch.randn(4, 5, 300)).to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prefix_matching(dtype):
    # In bf16 the baselines round logits and probabilities, so the values are such that nothing is lost.
    q, k = (torch.randint(-1, 2, (1, 3, 40, 16)).to(dtype) for _ in range(2))
    providers = prefix_matching.providers(q, k, torch.randperm(99)[:20].repeat(1, 2))
    if dtype is torch.bfloat16:
        providers = {name: one for name, one in providers.items() if name == "prefix_matching" or "flash" in name}
    agree(providers)
