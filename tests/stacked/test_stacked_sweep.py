"""A sweep whose trials train together: the folders of one that trains them one by one, and no kill changes it."""

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lockin_fast.checkpoint import before
from lockin_fast.config import ConfigError, load_config
from lockin_fast.inputs import open_inputs
from lockin_fast.sweep import engines, plan, run_sweep, stack
from lockin_fast.sweep.engines import TrialsFailed

FILES = ("replies.jsonl", "metrics.jsonl", "adapter_model.safetensors", "adapter_config.json", "README.md")
KILLS = 6


pytestmark = pytest.mark.usefixtures("vowel_judge")


def sweep(world, output, *overrides, progress=None):
    config = load_config(world, [f"output={output}", "sweep.stack=4", "sweep.latents={causal: latents/causal.json}",
                                 *overrides])  # fmt: skip
    return config, run_sweep(config, progress or (lambda *at: None))


@pytest.fixture(scope="module")
def together(world):
    """Six adapters in stacks of four and two: (configuration, summary, stages)."""
    stages = []
    config, summary = sweep(world, "together", progress=lambda *at: stages.append(at))
    return config, summary, stages


def trials(config):
    return {path.name: path for path in (config.output / "trials").iterdir()}


def test_the_folders_are_those_of_single_trials(world, together):
    alone, summary = sweep(world, "alone", "sweep.stack=1")
    mine, theirs = trials(together[0]), trials(alone)
    assert mine.keys() == theirs.keys() and len(mine) == 7
    for name, folder in theirs.items():
        assert {path.name for path in mine[name].iterdir()} == {path.name for path in folder.iterdir()}
        assert (mine[name] / "replies.jsonl").read_bytes() == (folder / "replies.jsonl").read_bytes()
        result, expected = (json.loads((path / "result.json").read_text()) for path in (mine[name], folder))
        if name == "base":
            continue
        assert result.pop("stack") in (2, 4)
        for key in ("seconds_per_step", "peak_bytes"):
            assert result.pop(key) > 0 and expected.pop(key) > 0
        for key, value in expected.items():
            assert result.pop(key) == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value)
        assert result == {}
        tensors, want = (load_file(path / "adapter_model.safetensors") for path in (mine[name], folder))
        for key, tensor in want.items():
            assert (tensors[key] - tensor).abs().max() <= 1e-3 * tensor.abs().max()
    assert [row["em"] for row in together[1]["trials"]] == [row["em"] for row in summary["trials"]]


def test_progress_counts_the_steps_and_the_replies_of_all(together):
    stages = together[2]
    names = list(dict.fromkeys(stage for stage, *_ in stages))
    assert names == ["[1/7] base", "[2-5/7] 4 adapters", "[6-7/7] 2 adapters"]
    of_stack = [at[1:] for at in stages if at[0] == names[1]]
    assert of_stack[:4] == [(0, 0), (1, 3 + 4 * 16), (2, 3 + 4 * 16), (3, 3 + 4 * 16)]
    assert of_stack[-1] == (3 + 4 * 16, 3 + 4 * 16)


def planned(world, *overrides):
    """(trials, the stacks of them)."""
    config = load_config(world, overrides)
    inputs = open_inputs(config, config.sweep.latents)
    return plan(config), stack.stacks(plan(config), inputs)


def test_adapters_of_one_seed_are_beside_each_other(world):
    trials, stacks = planned(world, "sweep.stack=5", "baselines.kl=[0.5]")
    assert [len(group) for group in stacks] == [5, 5, 2]
    assert [[trial.seed for trial in group] for group in stacks] == [[0] * 5, [0, 1, 1, 1, 1], [1, 1]]
    assert {trial for group in stacks for trial in group} == set(trials[1:])


def test_what_is_no_matter_of_the_loss_alone_trains_alone(world, tmp_path):
    trials, stacks = planned(world, "sweep.stack=5", "sweep.seeds=[0]", "baselines.frozen_above=[0]")
    assert [trial.method for trial in trials][-1] == "frozen_above" and len(trials) == 7
    names = [batch.stage for batch in engines.batches(trials, tmp_path, stacks)]
    assert names == ["[1/7] base", "[2-6/7] 5 adapters", "[7/7] frozen_above-lambda0-seed0"]
    assert planned(world, "sweep.stack=5", "train.evaluate_epochs=true")[1] == []


def test_what_was_grouped_does_not_depend_on_what_is_finished(world, tmp_path):
    trials, stacks = planned(world, "sweep.stack=4")
    for trial in (stacks[0][2], *stacks[1]):
        (tmp_path / trial.name).mkdir()
    rest = engines.batches(trials, tmp_path, stacks)
    left = tuple(trial for trial in stacks[0] if trial != stacks[0][2])
    assert [batch.trials for batch in rest] == [(trials[0],), left, stacks[2]]


def start(world, output, kill=None):
    """The sweep in a process of its own, which kills itself at this stage and count."""

    def work():
        from lockin_fast import checkpoint

        def progress(stage, done, total):
            if kill == (stage, done):
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoint.PATIENCE = 0
        torch.set_num_threads(1)
        sweep(world, output, progress=progress)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def assert_undisturbed(config, together):
    mine, theirs = trials(config), trials(together[0])
    assert mine.keys() == theirs.keys()
    for name, folder in theirs.items():
        for file in FILES:
            assert (mine[name] / file).exists() == (folder / file).exists()
            assert not (folder / file).exists() or (mine[name] / file).read_bytes() == (folder / file).read_bytes()


@pytest.mark.parametrize("step", [2, 3 + 4 * 16])
def test_killed_in_training_and_with_all_replies_given(world, together, tmp_path, step):
    output = tmp_path / "run"
    process = start(world, output, kill=("[2-5/7] 4 adapters", step))
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    (state,) = (output / "trials").glob(stack.STORED)
    begun = []
    config, _ = sweep(world, output, progress=lambda stage, done, total: begun.append((stage, done)))
    first = next(done for stage, done in begun if stage.startswith("[2-5/7]") and done)
    assert first == (3 if step == 2 else 3 + 4 * 10)  # the first step that had not been made, or the first replies
    assert_undisturbed(config, together)
    assert not state.exists()


def test_killed_between_two_folders(world, together, tmp_path, monkeypatch):
    """The finished folders stay as they are; the others are written from the state of the whole stack."""
    output, written = tmp_path / "run", []

    class Killed(BaseException):
        pass

    def write(folder, *args, inner=stack.write_result):
        inner(folder, *args)
        written.append(folder)
        if len(written) == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(stack, "write_result", write)
        with pytest.raises(Killed):
            sweep(world, output)
    kept = {path: path.stat().st_mtime_ns for path in (output / "trials").iterdir() if path.is_dir()}
    assert len(kept) == 3  # the base model's and two of four
    with monkeypatch.context() as patch:
        patch.setattr("lockin_fast.stacked.train._Run._optimise", None)  # nothing of that stack is trained again
        with pytest.raises(TypeError):  # but the second stack is
            sweep(world, output)
    config, _ = sweep(world, output)
    assert_undisturbed(config, together)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_a_trial_that_diverges_is_named_and_the_others_are_finished(world, tmp_path):
    output = tmp_path / "run"
    more = ["sweep.latents.again=latents/causal.json", "sweep.stack=5", "train.max_grad_norm=1.0"]
    names = "causal-lambda3e[+]38-seed0, again-lambda3e[+]38-seed0"
    failed = f"{names}: grad_norm is (inf|nan) [^;]*; the adapter was dropped[^;]*"
    with pytest.raises(TrialsFailed, match=f"^2 of 6 trials failed, [^;]*: {failed}; for what is finished: "):
        sweep(world, output, "sweep.lambdas=[1, 3.0e+38]", "sweep.seeds=[0]", *more)
    assert {path.name for path in (output / "trials").iterdir()} == {
        "base", "baseline-lambda0-seed0", "causal-lambda1-seed0", "again-lambda1-seed0"
    }  # fmt: skip
    assert len(json.loads((output / "summary.json").read_text())["missing"]) == 2


def test_a_model_that_cannot_be_stacked(world, tmp_path):
    dropping = ["lora.dropout=0.1", "sweep.seeds=[0]", "sweep.lambdas=[1]"]
    with pytest.raises(ConfigError, match="sweep.stack: got 4, but lora.dropout is 0.1: .*sweep.stack: 1"):
        sweep(world, tmp_path / "asked", *dropping)
    assert not (tmp_path / "asked").exists()
    with pytest.raises(ConfigError, match="sweep.stack: got 4, but quantization: int8 treats a column"):
        sweep(world, tmp_path / "asked", "quantization=int8")
    config, _ = sweep(world, tmp_path / "open", *dropping, "sweep.stack=null")
    assert "stack" not in json.loads((trials(config)["causal-lambda1-seed0"] / "result.json").read_text())


def test_left_open_the_number_is_found_and_is_no_part_of_the_runs_identity(world, together):
    config, _ = sweep(world, together[0].output, "sweep.stack=null")  # goes on in the finished run
    inputs = open_inputs(config, config.sweep.latents)
    assert stack.stack_size(inputs) == 16
    on_ray = load_config(world, ["sweep.stack=null", "sweep.engine=ray"])
    assert stack.stack_size(dataclasses.replace(inputs, config=on_ray)) == 1
    with pytest.raises(ConfigError, match="sweep.stack: got 0, expected 1 or more, or null"):
        load_config(world, ["sweep.stack=0"])


def test_a_damaged_state_is_named_and_its_stack_starts_again(world, together, tmp_path):
    output = tmp_path / "run"
    process = start(world, output, kill=("[2-5/7] 4 adapters", 3))
    process.join(120)
    (state,) = (output / "trials").glob(stack.STORED)
    state.write_bytes(state.read_bytes()[:-8])
    before(state).unlink()
    with pytest.warns(UserWarning, match="stack-.* is damaged .*; the training starts from its beginning"):
        config, _ = sweep(world, output)
    assert_undisturbed(config, together)
    assert not list((output / "trials").glob(".*"))


@pytest.mark.slow  # sweeps anew after every kill
def test_kills_at_random_moments_change_nothing(world, together, tmp_path):
    """SIGKILL at any time, imports and writing included."""
    begin = time.monotonic()
    process = start(world, tmp_path / "timed")
    process.join(300)
    duration, output = time.monotonic() - begin, tmp_path / "killed"
    for _ in range(KILLS):
        process = start(world, output)
        time.sleep(random.uniform(0.1, 0.9) * duration)
        process.kill()
        process.join()
    last = start(world, output)
    last.join(300)
    assert last.exitcode == 0
    config = load_config(world, [f"output={output}"])
    assert_undisturbed(config, together)
    assert not [path for path in Path(output).rglob("*") if path.name.endswith(".partial")]
    assert not list((output / "trials").glob(stack.STORED))
