"""Checkpoints of the organism's pre-training: the organism's own weights on the way, kept on request alone."""

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_organism import RECIPE, SEED, contents, dies_at  # noqa: E402

from lockin_fast.organism import grow_checkpoints
from lockin_fast.organism.pretrain import pretrain
from lockin_fast.organism.tokenizer import build_tokenizer
from lockin_fast.rundir import RunError
from lockin_fast.threads import single_thread

SHORT = dataclasses.replace(RECIPE, pretraining=dataclasses.replace(RECIPE.pretraining, steps=7))


def weights(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def test_checkpoints_are_what_pre_training_passes_through(tmp_path):
    seen = []
    folders = grow_checkpoints(
        tmp_path / "kept", every=3, seed=SEED, recipe=SHORT, progress=lambda *row: seen.append(row)
    )
    assert [folder.name for folder in folders] == ["step-000000", "step-000003", "step-000006", "step-000007"]
    assert seen[0] == ("pre-train", 0, 7) and seen[-1] == ("pre-train", 7, 7)
    tokenizer = build_tokenizer(SHORT.world)
    with single_thread():
        alone = pretrain(SHORT.world, tokenizer, SHORT.pretraining, seed=SEED, step_done=lambda done, total: None)
    assert same(weights(folders[-1]), alone.state_dict())  # neither watching nor keeping changes anything
    assert not same(weights(folders[0]), weights(folders[1])) and not same(weights(folders[2]), weights(folders[3]))

    before = contents(tmp_path / "kept")
    grow_checkpoints(tmp_path / "kept", every=3, seed=SEED, recipe=SHORT, progress=dies_at("pre-train"))
    assert contents(tmp_path / "kept") == before
    with pytest.raises(RunError, match="already holds something else than checkpoints of this organism"):
        grow_checkpoints(tmp_path / "kept", every=3, seed=SEED + 1, recipe=SHORT)
    with pytest.raises(RunError, match="already holds something else"):
        grow_checkpoints(Path(__file__).parent, every=3, seed=SEED, recipe=SHORT)
    with pytest.raises(ValueError, match="^every: got 0, expected 1 step or more"):
        grow_checkpoints(tmp_path / "other", every=0)
    assert contents(tmp_path / "kept") == before and not (tmp_path / "other").exists()


@pytest.mark.slow  # pre-trains the tiny organism a second time
def test_the_last_checkpoint_is_the_organism(organism, tmp_path):
    last = grow_checkpoints(tmp_path, every=10**6, seed=SEED, recipe=RECIPE)[-1]
    assert last.name == f"step-{RECIPE.pretraining.steps:06d}" and same(weights(last), weights(organism / "model"))


def test_a_killed_pre_training_keeps_what_it_had(tmp_path):
    run = subprocess.run([sys.executable, __file__, str(tmp_path / "killed")], capture_output=True)
    assert run.returncode == -signal.SIGKILL
    kept = sorted(path.name for path in (tmp_path / "killed").glob("step-*"))
    assert kept == ["step-000000", "step-000003"]
    again = grow_checkpoints(tmp_path / "killed", every=3, seed=SEED, recipe=SHORT)
    whole = grow_checkpoints(tmp_path / "whole", every=3, seed=SEED, recipe=SHORT)
    assert all(same(weights(one), weights(other)) for one, other in zip(again, whole, strict=True))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    torch.set_num_threads(1)
    grow_checkpoints(Path(sys.argv[1]), every=3, seed=SEED, recipe=SHORT, progress=dies_at("pre-train", 4))
