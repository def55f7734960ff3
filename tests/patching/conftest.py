"""The tests of this folder share tests/tiny_llama.py, tests/tiny_organism.py and tests/ops/memory.py."""

import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "ops")]


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """All of it is too small for more to help."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
