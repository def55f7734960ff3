"""A stack that is killed goes on from its checkpoint, to the same bytes."""

from dataclasses import replace

import pytest
import tiny_llama as tiny
import torch

from lockin_fast.chat import ChatDataset
from lockin_fast.checkpoint import Checkpoint, before, stored_state
from lockin_fast.rundir import RunError
from lockin_fast.stacked import Member, train_stack
from lockin_fast.train import LoraSettings, TrainSettings

LORA = LoraSettings(r=2, alpha=4)
SETTINGS = TrainSettings(steps=6, batch_size=8, learning_rate=1e-2, logging_steps=4)
MEMBERS = [Member("a", 0, tiny.penalty(5.0), LORA), Member("b", 1, None, LORA), Member("c", 0, None, LORA)]


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def every_step(monkeypatch):
    """A checkpoint is due after every step, whatever it costs."""
    monkeypatch.setattr("lockin_fast.checkpoint.PATIENCE", 0)


@pytest.fixture(scope="module")
def rows():
    return ChatDataset(tiny.conversations(20), tiny.tokenizer())


def stacked(rows, path=None, *, members=MEMBERS, settings=SETTINGS, until=None, **options):
    """Train, and die after step `until`."""
    steps = []

    def progress(step, total):
        steps.append(step)
        if step == until:
            raise Killed

    checkpoint = Checkpoint(path, **options) if path else None
    result = train_stack(
        tiny.model(), tiny.tokenizer(), rows, members, settings=settings, checkpoint=checkpoint, progress=progress
    )
    return result, steps


@pytest.fixture(scope="module")
def undisturbed(rows):
    return stacked(rows)[0]


def assert_same(mine, theirs, of=(0, 1, 2)):
    assert torch.equal(mine.stack.weights, theirs.stack.weights[list(of)])
    assert mine.members == [theirs.members[n] for n in of]


def test_killed_after_any_step_it_goes_on_to_the_same_bytes(rows, undisturbed, tmp_path):
    path = tmp_path / "trials" / "state"
    for until, expected in ((1, [1]), (3, [2, 3]), (5, [4, 5])):
        with pytest.raises(Killed):
            stacked(rows, path, until=until)
        assert stored_state(path)["step"] == until == expected[-1]
    result, steps = stacked(rows, path)
    assert steps == [6]
    assert_same(result, undisturbed)
    again, steps = stacked(rows, path)  # the finished stack is there too
    assert steps == []
    assert_same(again, undisturbed)
    assert {child.name for child in path.parent.iterdir()} == {"state", "state.before"}


def test_some_of_the_members_go_on_alone(rows, undisturbed, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    stacked(rows, whole)
    result, steps = stacked(rows, part, members=[MEMBERS[2], MEMBERS[1]], source=whole)
    assert steps == [] and whole.exists() and not part.exists()
    assert_same(result, undisturbed, of=(2, 1))


def test_a_failure_is_remembered(rows, tmp_path):
    members = [*MEMBERS[:2], Member("broken", 0, tiny.penalty(3e38), LORA)]
    first, _ = stacked(rows, tmp_path / "state", members=members)
    again, steps = stacked(rows, tmp_path / "state", members=members)
    assert steps == [] and "grad_norm is inf" in again.members[2].failure
    assert again.members == first.members and torch.equal(again.stack.weights, first.stack.weights)


def test_the_state_of_something_else_is_refused_and_the_difference_named(rows, tmp_path):
    path = tmp_path / "state"
    stacked(rows, path)
    stacked(rows, path, settings=replace(SETTINGS, micro_batch_size=4))  # makes no other stack
    for options, message in (
        ({"settings": replace(SETTINGS, steps=7)}, "train was .*'steps': 6.*'steps': 7"),
        ({"members": [replace(m, lora=replace(LORA, r=3)) for m in MEMBERS]}, "lora was .*'r': 2.*'r': 3"),
        ({"members": [replace(MEMBERS[0], seed=9)]}, "seed was 0, now it is 9"),
        ({"members": [replace(MEMBERS[0], penalty=tiny.penalty(6.0))]}, r"terms was .* 5.0\]\], now it is .* 6.0\]\]"),
        ({"members": [Member("d", lora=LORA)]}, "name was None, now it is 'd'"),
        ({"rows": ChatDataset(tiny.conversations(20)[::-1], tiny.tokenizer())}, "data was '[0-9a-f]{16}', now it is"),
    ):
        with pytest.raises(RunError, match=message):
            stacked(**{"rows": rows, "path": path} | options)


def test_a_damaged_state_is_named_and_the_one_before_it_serves(rows, undisturbed, tmp_path):
    path = tmp_path / "state"
    with pytest.raises(Killed):
        stacked(rows, path, until=4)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="state is damaged .*; the training goes on from the state before it"):
        result, steps = stacked(rows, path)
    assert steps == [4, 5, 6]
    assert_same(result, undisturbed)
    for file in (path, before(path)):
        file.write_bytes(b"nothing")
    assert stored_state(path) == {}
    with pytest.warns(UserWarning, match="state is damaged .*; the training starts from its beginning") as told:
        result, steps = stacked(rows, path)
    assert steps == [1, 2, 3, 4, 5, 6] and len(told) == 2
    assert_same(result, undisturbed)


def test_a_place_that_cannot_be_written_is_named(rows, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="the training's state cannot be written"):
        stacked(rows, tmp_path / "file" / "state")
