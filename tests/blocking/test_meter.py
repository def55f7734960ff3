"""LossMeter: means over steps, whatever the accumulation and the number of processes."""

import pytest
import torch

from lockin_fast.blocking.meter import LossMeter


def named(*losses):
    return dict(zip(("sft_loss", "block_penalty"), map(torch.tensor, losses), strict=False))


def test_means_are_over_steps_and_the_fraction_over_pairs():
    meter = LossMeter(("block_penalty",))
    for *losses, active, pairs in ((1.0, 0.5, 3, 10), (2.0, 0.0, 1, 30), (3.0, 1.0, 0, 40), (4.0, 0.5, 4, 20)):
        meter.add(named(*losses), torch.tensor(active), torch.tensor(pairs), share=0.5)
    assert meter.drain() == {"sft_loss": 5.0, "block_penalty": 1.0, "active_fraction": 0.08}
    assert meter.drain() == {}


def test_processes_are_averaged():
    meter = LossMeter(("block_penalty",))
    meter.add(named(1.0, 0.5), 1, 10, share=1.0)
    other = torch.tensor([[3.0, 1.5, 5.0, 10.0]], dtype=torch.float64)
    means = meter.drain(lambda mine: torch.cat([mine, other]))
    assert means == {"sft_loss": 2.0, "block_penalty": 1.0, "active_fraction": 0.3}


def test_nan_stays_visible():
    meter = LossMeter()
    meter.add(named(float("nan")), share=1.0)
    meter.add(named(1.0), share=1.0)
    assert meter.drain()["sft_loss"] != pytest.approx(1.0)
