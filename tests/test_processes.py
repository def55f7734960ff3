"""`lockin-fast train` under torchrun: the adapter of one process, written once; everything else is refused there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lockin_fast import processes, terminal
from lockin_fast.chat import ChatDataset
from lockin_fast.cli import main
from lockin_fast.config import load_config
from lockin_fast.inputs import open_inputs
from lockin_fast.sweep.single import run_training
from lockin_fast.train import TrainSettings, fine_tune

TESTS = Path(__file__).parent
STEPS, ROWS, LEARNING_RATE = 3, 8, 1e-2
# Summing a step's tokens in another order moves a sum by at most an ulp of it a token: below 32 tokens a row.
ROUNDING = ROWS * 32 * torch.finfo(torch.float32).eps
SETTINGS = ["block.weight=5", "block.latents=latents/causal.json", f"train.steps={STEPS}"]


@pytest.fixture
def process(monkeypatch):
    """process(rank, count): this process is one of several, by the environment that torchrun makes."""

    def be(rank, count):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(count))

    yield be
    terminal.out.quiet = False


def launch(config, output, *settings):
    """The standard output of `torchrun --nproc_per_node 2 lockin-fast train`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command += ["lockin_fast.cli", "train", str(config)]
    for setting in (f"output={output}", *SETTINGS, *settings):
        command += ["--set", setting]
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, check=True, timeout=300, stdout=subprocess.PIPE, text=True).stdout


@pytest.mark.slow  # two processes that import everything, twice
def test_two_processes_train_the_adapter_of_one(world, one_thread):
    """2 processes x 2 forwards x 2 rows against 8 rows at once."""
    alone = run_training(load_config(world, ["output=alone", *SETTINGS]))
    shown = launch(world, "shared", "train.micro_batch_size=2")
    runs = [world.parent / name for name in ("alone", "shared")]
    files = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in runs]
    assert files[0] == files[1]
    expected, found = (load_file(run / "adapter" / "adapter_model.safetensors") for run in runs)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():  # a step of AdamW moves a weight by the learning rate at most
        assert (found[name] - tensor).abs().max() <= STEPS * LEARNING_RATE * ROUNDING, name
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").open()] for run in runs]
    for before, after in zip(*rows, strict=True):
        assert after == {key: pytest.approx(value, rel=STEPS * ROUNDING) for key, value in before.items()}
    assert [line.split()[0] for line in shown.splitlines()] == ["training:", *alone]
    kept = {path: path.stat().st_mtime_ns for path in runs[1].rglob("*")}
    again = run_training(load_config(world, ["output=shared", *SETTINGS]))  # by one process: it is the same run
    assert again == json.loads((runs[1] / "adapter" / "result.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in runs[1].rglob("*")} == kept


@pytest.mark.parametrize(
    ("rows", "micro", "count", "message"),
    [
        (8, None, 3, "got 8 rows, which 3 processes cannot share evenly"),
        (8, 4, 4, "got 8 rows, which 4 processes cannot share evenly in forwards of 4"),
    ],
)
def test_rows_that_cannot_be_shared_are_refused(world, process, tmp_path, rows, micro, count, message):
    config = load_config(world)
    inputs = open_inputs(config, {})
    process(0, count)
    settings = TrainSettings(batch_size=rows, micro_batch_size=micro)
    with pytest.raises(ValueError, match=f"^train.batch_size: {message}$"):
        fine_tune(inputs.model, inputs.tokenizer, inputs.dataset, tmp_path / "out" / "adapter", settings=settings)
    assert isinstance(inputs.dataset, ChatDataset) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_sharded_model_is_refused(world, monkeypatch, tmp_path, name):
    inputs = open_inputs(load_config(world), {})
    monkeypatch.setenv(name, "true")
    with pytest.raises(ValueError, match=f"^{name}: this trains with a whole model in every process; launch"):
        fine_tune(inputs.model, inputs.tokenizer, inputs.dataset, tmp_path / "out" / "adapter")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["sweep", "patch"])
def test_other_commands_are_refused(world, process, capsys, command):
    process(1, 2)
    assert main([command, str(world)]) == 1
    printed = capsys.readouterr()
    assert f"error: {command}: runs in one process; torchrun is for train, cache, discover" in printed.err


def test_the_first_process_prints_and_the_others_do_not(process, capsys):
    for rank in (0, 1):
        process(rank, 2)
        assert processes.is_first() == (rank == 0)
        main(["train", "there-is-no.yaml"])
        terminal.line("shown")
        assert ("shown" in capsys.readouterr().out) == (rank == 0)


def test_a_process_alone_waits_for_nobody(process):
    assert processes.count() == 1 and processes.is_first()
    processes.wait_for_all()
    processes.part()


def test_every_process_has_its_own_gpu(process, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert processes.device() == "cuda" and not chosen
    process(1, 2)
    assert processes.device() == "cuda" and chosen == [1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert processes.device() == "cpu"
