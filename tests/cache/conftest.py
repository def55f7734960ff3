"""The tests of this folder share tests/tiny_llama.py, its rows, and a cache of each kind."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny_llama as tiny  # noqa: E402
from cached_training import LAYER, SETTINGS  # noqa: E402

from lockin_fast.blocking.write_cache import CacheSource, write_hidden_states, write_latents  # noqa: E402
from lockin_fast.chat import ChatDataset  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """All of it is too small for more to help."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def rows():
    return ChatDataset(tiny.conversations(24), tiny.tokenizer())


@pytest.fixture(scope="session")
def caches(tmp_path_factory, rows):
    """(kind, dtype) -> the folder of a cache of the tiny model's layer; every token is in it."""
    made = {}

    def folder(kind="latents", dtype=torch.float32):
        if (kind, dtype) not in made:
            path = tmp_path_factory.mktemp("cache") / kind
            source = CacheSource(tiny.model(dtype=dtype), LAYER, rows, tokens="all")
            if kind == "latents":
                write_latents(path, source, tiny.sae(), range(tiny.LATENTS), settings=SETTINGS)
            else:
                write_hidden_states(path, source, outliers=2, blocksize=16, settings=SETTINGS)
            made[kind, dtype] = path
        return made[kind, dtype]

    return folder
