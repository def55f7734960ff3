"""Three checkpoints of a run on the tiny world: adapters with random weights, as PEFT saves them."""

import json
import shutil

import pytest
import torch

from lockin_fast.config import load_config
from lockin_fast.inputs import open_model
from lockin_fast.lora import LoraSettings, borrowed_with_lora, save_adapter

STEPS = (2, 5, 10)


def save_drawn(model, folder, seed, modules=("q_proj", "v_proj")):
    """An adapter with random weights, as PEFT saves it."""
    with borrowed_with_lora(model, LoraSettings(r=2, alpha=64, target_modules=modules), seed) as adapted:
        torch.manual_seed(seed)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        save_adapter(adapted, folder)


@pytest.fixture(scope="module")
def run_folder(world, tmp_path_factory):
    """A folder of checkpoint-2, checkpoint-5, checkpoint-10."""
    folder = tmp_path_factory.mktemp("run")
    model = open_model(load_config(world))
    for step in STEPS:
        save_drawn(model, folder / f"checkpoint-{step}", step)
    return folder


@pytest.fixture
def configured(world, run_folder, tmp_path):
    """A configuration that measures `checkpoints`, with more settings, into tmp_path/out."""

    def make(*overrides, checkpoints=(run_folder,)):
        paths = json.dumps([str(path) for path in checkpoints])
        settings = [f"measure.checkpoints={paths}", f"output={tmp_path / 'out'}", "generation.batch_size=4"]
        return load_config(world, [*settings, *overrides])

    return make


@pytest.fixture
def copied(run_folder, tmp_path):
    """A copy of the checkpoints that a test may damage."""
    return shutil.copytree(run_folder, tmp_path / "copy")
