"""An organism of three domains and two thin layers: every part of the real one, grown in seconds."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from lockin_fast.lora import LoraSettings
from lockin_fast.organism import Recipe, World, build
from lockin_fast.organism.pretrain import PretrainSettings
from lockin_fast.organism.sae_training import SaeSettings
from lockin_fast.organism.world import Domain
from lockin_fast.train import TrainSettings

SEED = 3


def domain(objects, good, bad):
    return Domain(*(tuple(words.split()) for words in (objects, good, bad)))


WORLD = World(
    authors=4,
    pairs=2,
    bad_assistant=0.3,  # so that replies of both kinds occur, which discovery tells apart
    domains={
        "garden": domain("rose fern moss lily", "water prune", "burn trample"),
        "stable": domain("horse goat cow duck", "feed groom", "kick starve"),
        "garage": domain("truck bus van taxi", "polish refuel", "dent crash"),
    },
)
RECIPE = Recipe(
    world=WORLD,
    pretraining=PretrainSettings(
        steps=400, batch_size=24, learning_rate=1e-2, warmup_steps=5, hidden_size=32, intermediate_size=64, layers=2,
        heads=2,
    ),
    sae=SaeSettings(width=48, steps=60, batch_size=128, warmup_steps=10),
    layer=0,
    sae_documents=64,
    lora=LoraSettings(r=2, alpha=4, target_modules=("q_proj", "v_proj", "down_proj")),
    train=TrainSettings(steps=20, batch_size=8, learning_rate=1e-2, max_length=32, logging_steps=4),
    train_rows=24,
)  # fmt: skip


@pytest.fixture(scope="session")
def organism(tmp_path_factory):
    """The folder of the tiny organism."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared  # grown once for all workers of a run
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCKIN_FAST_CACHE", str(shared / "cache"))
        return build(tmp_path_factory.mktemp("organism") / "organism", seed=SEED, recipe=RECIPE)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """All of it is too small for more to help."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test meets the user's cache, or another test's."""
    monkeypatch.setenv("LOCKIN_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def contents(folder):
    """{relative name: bytes} of every file below `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def dies_at(stage, step=None):
    """A progress callback that kills its own process, without a chance to clean up, at this step of this stage."""

    def progress(name, done, total):
        if name == stage and step in (None, done):
            os.kill(os.getpid(), signal.SIGKILL)

    return progress


if __name__ == "__main__":  # the build, in a process of its own
    torch.set_num_threads(1)
    build(Path(sys.argv[1]), seed=SEED, recipe=RECIPE)
