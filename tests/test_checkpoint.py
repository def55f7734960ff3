"""The file that a training's state is kept in: when it is written, what it holds, and what damage does."""

import pytest
import torch
from safetensors.torch import load_file

from lockin_fast import checkpoint
from lockin_fast.checkpoint import Checkpoint, before, check_same, stored_state
from lockin_fast.rundir import RunError

CPU = torch.device("cpu")
TENSORS = {
    "weights": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "sums": torch.tensor([1.0, 2.0], dtype=torch.float64),
    "halves": torch.ones(3, dtype=torch.bfloat16),
    "none": torch.zeros(0, 4),
}


def write(path, step):
    Checkpoint(path).write({name: tensor + step for name, tensor in TENSORS.items()}, {"step": step, "x": 0.1 + step})


def assert_step(found, step):
    tensors, state = found
    assert state == {"step": step, "x": 0.1 + step} and tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor + step)


@pytest.fixture
def written(tmp_path):
    """A state of step 2, and before it one of step 1."""
    for step in (1, 2):
        write(tmp_path / "below" / "state", step)
    return tmp_path / "below" / "state"


def test_what_was_written_is_read_and_the_one_before_is_kept(written):
    assert_step(Checkpoint(written).read(CPU), 2)
    assert_step(Checkpoint("elsewhere", source=before(written)).read(CPU), 1)
    assert stored_state(written)["step"] == 2
    assert sorted(path.name for path in written.parent.iterdir()) == ["state", "state.before"]
    Checkpoint(written).remove()
    Checkpoint(written).remove()
    assert not list(written.parent.iterdir())
    assert Checkpoint(written).read(CPU) is None and stored_state(written) == {}


def test_it_is_an_ordinary_safetensors_file(written):
    tensors = load_file(written)
    assert all(torch.equal(tensors[name], tensor + 2) for name, tensor in TENSORS.items())


def test_files_are_written_over_in_turn_whatever_their_size(written):
    files = {path.stat().st_ino for path in (written, before(written))}
    for step, rows in ((3, 9), (4, 1), (5, 4)):
        Checkpoint(written).write({"weights": torch.full((rows, 7), float(step))}, {"step": step, "more": "x" * rows})
        tensors, state = Checkpoint(written).read(CPU)
        assert state["step"] == step and torch.equal(tensors["weights"], torch.full((rows, 7), float(step)))
        assert {path.stat().st_ino for path in (written, before(written))} == files


@pytest.mark.parametrize("newest", [True, False])
def test_the_only_state_is_never_written_over(written, monkeypatch, newest):
    """A kill in the middle of a write leaves one, also where there was one only."""
    (before(written) if newest else written).unlink()

    def killed(path, tensors, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        write(written, 3)
    assert_step(Checkpoint(written).read(CPU), 2 if newest else 1)


def test_killed_between_its_two_renames_the_state_before_is_the_newest(written, recwarn):
    written.unlink()
    assert_step(Checkpoint(written).read(CPU), 1)
    assert stored_state(written)["step"] == 1 and not recwarn


def damaged(content, how):
    if how == "cut":
        return content[: len(content) // 2]
    if how == "empty":
        return b""
    place = {"header": 12, "state": content.index(b"step") + 9, "tensor": len(content) - 3}[how]
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("how", ["cut", "empty", "header", "state", "tensor"])
def test_damage_of_any_kind_is_named_and_the_state_before_it_serves(written, how):
    written.write_bytes(damaged(written.read_bytes(), how))
    with pytest.warns(UserWarning, match="below/state is damaged .*; the training goes on from the state before it$"):
        assert_step(Checkpoint(written).read(CPU), 1)
    assert not written.exists()
    before(written).write_bytes(damaged(before(written).read_bytes(), how))
    with pytest.warns(UserWarning, match="state.before is damaged .*; the training starts from its beginning$"):
        assert Checkpoint(written).read(CPU) is None
    assert not list(written.parent.iterdir())
    write(written, 3)
    assert_step(Checkpoint(written).read(CPU), 3)


def test_it_is_due_at_once_and_then_by_what_the_last_write_took(tmp_path, monkeypatch):
    times = iter([0.0, 0.0, 100.0, 104.0, 203.9, 204.0])  # made; asked; a write of four seconds; asked twice
    monkeypatch.setattr("lockin_fast.checkpoint.time.monotonic", lambda: next(times))
    kept = Checkpoint(tmp_path / "state")
    assert kept.due()
    kept.write(TENSORS, {})
    assert not kept.due() and kept.due()
    assert 1 / (1 + checkpoint.PATIENCE) < 0.04


def test_a_training_of_something_else_is_named(written):
    check_same(written, {"a": [1, 2], "b": None}, {"a": (1, 2), "b": None})
    with pytest.raises(RunError, match="state: the state of another training: a was 1, now it is 2; remove it, and"):
        check_same(written, {"a": 1}, {"a": 2})


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="the training's state cannot be written: .*; make room"):
        write(tmp_path / "file" / "state", 1)
