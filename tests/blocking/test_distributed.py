"""Two processes under DDP and FSDP2 compute the penalty's gradients, and train the adapter, of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_llama as tiny
import torch
from torch import nn

from lockin_fast.blocking.layers import is_sharded
from lockin_fast.blocking.write_cache import CacheSource, write_latents
from lockin_fast.chat import ChatDataset

TESTS = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
# Summing a step's tokens in another order moves a sum by at most an ulp of it a token: 8 rows below 32 tokens.
ROUNDING = 8 * 32 * torch.finfo(torch.float32).eps


def train(folder, *arguments, launcher=()):
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    script = [str(TESTS / "blocking" / "one_of_many.py"), str(folder), *map(str, arguments)]
    subprocess.run([*(launcher or [sys.executable]), *script], env=environment, check=True, timeout=300)
    return torch.load(folder / "result.pt", weights_only=True)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One process, 8 rows in one forward."""
    return train(tmp_path_factory.mktemp("one") / "run", "alone", 8, 1)


def added(result):
    """What the penalty adds to the gradients of the first step."""
    return {name: g - result[0.0]["gradients"][name] for name, g in result[500.0]["gradients"].items()}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The reference latents of the text that is trained on."""
    folder = tmp_path_factory.mktemp("cache") / "cache"
    rows = ChatDataset(tiny.conversations(24), tiny.tokenizer())
    write_latents(folder, CacheSource(tiny.model(), tiny.penalty().layer, rows), tiny.sae(), range(tiny.LATENTS))
    return folder


@pytest.mark.slow  # two processes that import everything
@pytest.mark.parametrize("reference", ["live", "cache"])
@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "fsdp2-checkpointing"])
def test_two_processes_equal_one(tmp_path, one, cache, mode, reference):
    """2 processes x 2 forwards x 2 rows against 8 rows at once, of which the reference is live."""
    two = train(tmp_path / "two", mode, 2, 2, *([cache] if reference == "cache" else []), launcher=TORCHRUN)
    assert_equal(one, two)
    assert max(one[500.0]["logs"][1::3]) > 0


@pytest.mark.slow  # two processes that import everything
def test_two_processes_equal_one_with_the_kl_penalty(tmp_path):
    one = train(tmp_path / "one", "alone", 8, 1, "kl")
    assert_equal(one, train(tmp_path / "two", "ddp", 2, 2, "kl", launcher=TORCHRUN))
    assert min(one[500.0]["logs"][1::2]) > 0


def assert_equal(one, two):
    """The gradients that the penalty adds, the adapter at the end, and the log."""
    largest = max(g.abs().max() for g in one[500.0]["gradients"].values())
    expected, found = added(one), added(two)
    assert max(g.abs().max() for g in expected.values()) > 0.1 * largest
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= ROUNDING * largest, name
    for weight, run in one.items():
        moved = 3e-3 * max(g.abs().max() for g in run["gradients"].values())
        for name, tensor in run["end"].items():
            assert (two[weight]["end"][name] - tensor).abs().max() <= 3 * ROUNDING * moved, name
        assert two[weight]["logs"] == pytest.approx(run["logs"], rel=3 * ROUNDING)


class FSDPLinear(nn.Linear):
    """Named as FSDP2 names the classes of the modules it shards."""


class FullyShardedDataParallel(nn.Sequential):
    """As the first FSDP wraps them."""


def test_sharded_models_are_known_by_any_of_their_modules():
    assert is_sharded(nn.Sequential(nn.Linear(2, 2), FSDPLinear(2, 2)))
    assert is_sharded(FullyShardedDataParallel(nn.Linear(2, 2)))
    assert not is_sharded(nn.Sequential(nn.Linear(2, 2)))
