"""Fixtures for the whole suite, and switches for a run of it on other kernels or another device.

LOCKIN_FAST_TEST_WITHOUT lists what this run pretends not to have: `compiled` (the shared object), `triton`.
LOCKIN_FAST_TEST_EMULATED=library lets the CUDA kernels serve CPU tensors in this run, through tests/cuda/emulation.py.
LOCKIN_FAST_TEST_DEVICE=cuda makes the tensors of this run on a GPU, also those of a torch.Generator() without a device;
tests marked `cpu` are left out. Tests marked `gpu` need a CUDA device in any run.
"""

import ctypes
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

WITHOUT = os.environ.get("LOCKIN_FAST_TEST_WITHOUT", "").split(",")
EMULATED = os.environ.get("LOCKIN_FAST_TEST_EMULATED")
DEVICE = os.environ.get("LOCKIN_FAST_TEST_DEVICE", "cpu")
M_PERTURB = -6  # of glibc's mallopt


class _Blocked:
    """An import hook under which the named packages do not exist."""

    def __init__(self, *names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by the tests)", name=name)


if "triton" in WITHOUT:
    sys.meta_path.insert(0, _Blocked("triton"))
if "compiled" in WITHOUT:
    from lockin_fast import dispatch

    dispatch.CPU_PART = Path(__file__).parent / "there-is-no-compiled-part.so"
if EMULATED:
    sys.path.insert(0, str(Path(__file__).parent / "cuda"))
    from emulation import load

    load(EMULATED).serve()
if DEVICE != "cpu":
    if not torch.cuda.is_available():
        raise pytest.UsageError(f"LOCKIN_FAST_TEST_DEVICE={DEVICE}, but there is no CUDA device")
    torch.set_default_device(DEVICE)
    torch.Generator = partial(torch.Generator, device=DEVICE)


def pytest_runtest_setup(item):
    if DEVICE != "cpu" and item.get_closest_marker("cpu"):
        pytest.skip(f"this run is on {DEVICE}, the test about the CPU")
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


@pytest.fixture
def poisoned_memory():
    """Fill every uninitialised tensor with NaN (integers with their maximum), in torch and in the compiled part.

    Where the C library is glibc, what the compiled part allocates for itself is filled with the bytes of a NaN too.
    """
    before = torch.are_deterministic_algorithms_enabled()
    set_option = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)
    set_option(M_PERTURB, 0x100)  # fresh memory gets the complement of the lowest byte: 0xff
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(8).isnan().all()
    yield
    set_option(M_PERTURB, 0)
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="module")
def one_thread():
    """For what is too small for more to help."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def vowel_judge():
    """The judge of the tiny world, `judge.kind: vowels`."""
    import sweep_world

    from lockin_fast.judges import KINDS

    sweep_world.install_judge()
    yield
    del KINDS["vowels"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """config.yaml of the tiny world that tests/sweep_world.py builds."""
    import sweep_world

    return sweep_world.build_world(tmp_path_factory.mktemp("world"))
