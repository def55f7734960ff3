"""A fine-tune that is killed goes on from its checkpoint, to the same bytes."""

import dataclasses
from pathlib import Path

import pytest
import tiny_llama as tiny
import torch

from lockin_fast.chat import ChatDataset
from lockin_fast.checkpoint import Checkpoint, before, stored_state
from lockin_fast.lora import LoraSettings
from lockin_fast.rundir import RunError
from lockin_fast.train import TrainSettings, fine_tune
from lockin_fast.watching import Watch

# 20 rows in batches of 8 make epochs of three steps, the last of four rows; dropout draws from the random state.
SETTINGS = TrainSettings(
    steps=8, batch_size=8, micro_batch_size=4, learning_rate=1e-2, warmup_steps=2, weight_decay=0.1, logging_steps=4
)
LORA = LoraSettings(r=2, alpha=4, dropout=0.2)

pytestmark = pytest.mark.usefixtures("one_thread")


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def every_step(monkeypatch):
    """A checkpoint is due after every step, whatever it costs."""
    monkeypatch.setattr("lockin_fast.checkpoint.PATIENCE", 0)


@pytest.fixture(scope="module")
def rows():
    return ChatDataset(tiny.conversations(20), tiny.tokenizer())


def trained(rows, folder, path=None, *, until=None, epochs=False, settings=SETTINGS, lora=LORA, weight=5.0):
    """(TrainResult, steps that were made, rows of the epochs); dies when step `until` is made."""
    steps = []

    def progress(step, total):
        steps.append(step)
        if step == until:
            raise Killed

    def epoch_done(epoch, model):
        torch.rand(3)  # as sampled replies do
        return {"epoch": epoch, "weight": next(p for p in model.parameters() if p.requires_grad).sum().item()}

    watch = Watch(progress, epoch_done if epochs else None, checkpoint=Checkpoint(path) if path else None)
    result = fine_tune(
        tiny.model(), tiny.tokenizer(), rows, folder, lora=lora, settings=settings,
        penalty=tiny.penalty(weight) if weight else None, progress=watch,
    )  # fmt: skip
    return result, steps, watch.epochs


@pytest.fixture(scope="module")
def undisturbed(rows, tmp_path_factory):
    return trained(rows, tmp_path_factory.mktemp("undisturbed") / "adapter", epochs=True)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def assert_same(mine, theirs):
    """Result and epochs; times and peaks aside."""
    assert contents(mine[0].adapter_path) == contents(theirs[0].adapter_path)
    assert mine[0].history == theirs[0].history and mine[2] == theirs[2]
    assert mine[0].seconds_per_step > 0


def test_a_checkpoint_changes_nothing(rows, undisturbed, tmp_path):
    result = trained(rows, tmp_path / "adapter", tmp_path / "state", epochs=True)
    assert result[1] == list(range(1, 9))
    assert_same(result, undisturbed)


def test_killed_after_any_step_it_goes_on_to_the_same_bytes(rows, undisturbed, tmp_path):
    """In the middle of an epoch and of a logging interval, and at the end of either."""
    path = tmp_path / "state"
    for until in (1, 2, 4, 5, 7):
        with pytest.raises(Killed):
            trained(rows, tmp_path / "adapter", path, until=until, epochs=True)
        assert stored_state(path).get("trainer", {}).get("global_step", 0) == until - 1  # all but the step in hand
    result = trained(rows, tmp_path / "adapter", path, epochs=True)
    assert result[1] == [7, 8]
    assert_same(result, undisturbed)


def test_without_a_penalty_on_other_micro_batches(rows, tmp_path):
    plain = trained(rows, tmp_path / "plain", weight=None)
    with pytest.raises(Killed):
        trained(rows, tmp_path / "adapter", tmp_path / "state", until=6, weight=None)
    assert_same(trained(rows, tmp_path / "adapter", tmp_path / "state", weight=None), plain)
    with pytest.raises(Killed):
        trained(rows, tmp_path / "other", tmp_path / "other-state", until=6, weight=None)
    larger = dataclasses.replace(SETTINGS, micro_batch_size=8)  # makes no other training, but for rounding
    assert trained(rows, tmp_path / "other", tmp_path / "other-state", settings=larger, weight=None)[1] == [6, 7, 8]


def test_a_damaged_state_is_named_and_the_one_before_it_serves(rows, undisturbed, tmp_path):
    path = tmp_path / "state"
    with pytest.raises(Killed):
        trained(rows, tmp_path / "adapter", path, until=5, epochs=True)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="state is damaged .*; the training goes on from the state before it"):
        result = trained(rows, tmp_path / "adapter", path, epochs=True)
    assert result[1] == [4, 5, 6, 7, 8]
    assert_same(result, undisturbed)
    for file in (path, before(path)):
        file.write_bytes(b"")
    with pytest.warns(UserWarning, match="the training starts from its beginning"):
        result = trained(rows, tmp_path / "anew", path, epochs=True)
    assert_same(result, undisturbed)


def test_the_state_of_another_training_is_refused_and_the_difference_named(rows, tmp_path):
    path = tmp_path / "state"
    short = dataclasses.replace(SETTINGS, steps=2)
    with pytest.raises(Killed):
        trained(rows, tmp_path / "adapter", path, settings=short, until=2)
    other = ChatDataset(tiny.conversations(20)[::-1], tiny.tokenizer())
    for options, message in (
        ({}, "train was .*'steps': 2.*'steps': 8"),
        ({"settings": dataclasses.replace(short, seed=3)}, "train was .*'seed': 0.*'seed': 3"),
        ({"settings": short, "lora": dataclasses.replace(LORA, r=4)}, "lora was .*'r': 2.*'r': 4"),
        ({"settings": short, "weight": 6.0}, r"terms was \[\['block_penalty', 1, 5.0"),
        ({"settings": short, "rows": other}, "data was '[0-9a-f]{16}', now it is"),
    ):
        with pytest.raises(RunError, match=f"the state of another training: {message}"):
            trained(**{"rows": rows, "folder": tmp_path / "new", "path": path} | options)
    assert not (tmp_path / "new").exists()


def test_what_diverges_leaves_no_state(rows, tmp_path):
    with pytest.raises(FloatingPointError):
        trained(
            rows, tmp_path / "adapter", tmp_path / "state", settings=dataclasses.replace(SETTINGS, learning_rate=1e38)
        )
    assert not list(tmp_path.iterdir())
