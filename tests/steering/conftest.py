"""The tests of this folder share tests/tiny_llama.py, and steered requests with what plain forwards answer to them."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """All of it is too small for more to help."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
