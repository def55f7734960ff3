"""The baselines of the narrow ops compute what ours do, or a comparison of times would mean nothing."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import block_penalty, block_penalty_nf4, patch, patch_diff, routing_stats, steer  # noqa: E402


def results(work):
    """name -> what the provider returns, each on a problem of its own, as some write in place."""
    return {name: work().providers[name]() for name in work().providers if "compile" not in name}


def gradients(monkeypatch, module, work):
    """name -> the gradient that a step leaves below the hidden state."""
    made = []

    class Recorded(block_penalty.Layers):
        def __init__(self, gradient):
            super().__init__(gradient)
            made.append(self)

    monkeypatch.setattr(module, "Layers", Recorded)
    found = {}
    for name in work().providers:
        if "compile" not in name:
            step = work().providers[name]
            step()
            (found[name],) = made[-1].gradients
    return found


@pytest.mark.parametrize(
    "arguments", [{}, {"cached": True}, {"cached": True, "active": 0.3}], ids=["h_ref", "z_ref", "few active"]
)
def test_the_penalty_in_a_step(monkeypatch, arguments):
    def work():
        return block_penalty.work(5, tokens=40, width=64, dtype=torch.float32, **arguments)

    found = gradients(monkeypatch, block_penalty, work)
    without = found.pop("no penalty")
    for grad in found.values():
        assert not torch.equal(grad, without)
        torch.testing.assert_close(grad, found["eager"])


def test_the_penalty_in_a_step_with_the_reference_in_nf4(monkeypatch):
    found = gradients(monkeypatch, block_penalty_nf4, lambda: block_penalty_nf4.work(torch.float32, 40, 128))
    without = found.pop("no penalty")
    assert len(found) >= 3
    for grad in found.values():
        assert not torch.equal(grad, without)
        torch.testing.assert_close(grad, found["table look-up, then eager"])


@pytest.mark.parametrize("packed", [False, True])
def test_patch(packed):
    first, *others = results(lambda: patch.work(5, 128, 20, packed)).values()
    assert len(others) == 2 and all(torch.equal(first, other) for other in others)


def test_steer():
    found = results(lambda: steer.work(6, 3, 128, 4))
    torch.testing.assert_close(found["steer_"], found["eager, in place"])


def test_patch_diff():
    found = results(lambda: patch_diff.work(5, 128, 7, 20))
    for ours, exact in zip(found["patch_diff"], found["eager fp32"], strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)


def test_routing_stats():
    found = results(lambda: routing_stats.work(50, 8, 2))
    probabilities, entropy, counts = found["eager"]
    ours = found["routing_stats"]
    torch.testing.assert_close(ours.probability.float(), probabilities)
    torch.testing.assert_close(ours.entropy_sum.float(), entropy)
    assert torch.equal(ours.class_counts.flatten(), counts)
