"""The autotuner without a GPU: off unless asked for, keeps what it measured, and survives a broken file."""

import json

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from lockin_fast.kernels.triton import _autotune  # noqa: E402

OWN, OTHER = {"BLOCK_T": 32, "num_warps": 4}, {"BLOCK_T": 64, "num_warps": 8}
H = torch.empty(100, 48, device="meta")


@pytest.fixture
def tuning(monkeypatch, tmp_path):
    """As on a GPU on which OTHER is faster; yields the list of what was timed."""
    timed = []

    def bench(run, **_):
        timed.append(run())
        return 2.0 if timed[-1] == OWN else 1.0

    monkeypatch.setenv("LOCKIN_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_autotune, "WANTED", True)
    monkeypatch.setattr(_autotune, "gpu_name", lambda device: "some GPU")
    monkeypatch.setattr(_autotune.triton.testing, "do_bench", bench)
    _autotune.results.cache_clear()
    yield timed
    _autotune.results.cache_clear()


def measured(op="op", h=H, latents=20):
    return _autotune.measured(op, h, latents, OWN, [OTHER], lambda config: config)


def test_nothing_is_measured_unless_asked_for(tuning, monkeypatch):
    monkeypatch.setattr(_autotune, "WANTED", False)
    assert measured() == OWN and not tuning and not _autotune.cache_file().exists()


def test_nothing_is_measured_where_nothing_runs(monkeypatch):
    monkeypatch.setattr(_autotune, "WANTED", True)
    assert measured() == OWN


def test_the_fastest_is_kept_on_disk(tuning):
    assert measured() == OTHER and tuning == [OWN, OTHER]
    assert measured() == OTHER and len(tuning) == 2
    _autotune.results.cache_clear()  # another process
    assert measured() == OTHER and len(tuning) == 2
    assert list(json.loads(_autotune.cache_file().read_text()).values()) == [OTHER]
    assert [path.name for path in _autotune.cache_file().parent.iterdir()] == ["triton.json"]


def test_every_op_dtype_width_and_size_class_is_its_own(tuning):
    measured()
    for changed in ({"op": "other"}, {"h": H.half()}, {"h": H[:, :40]}, {"h": H[:60]}, {"latents": 40}):
        before = len(tuning)
        measured(**changed)
        assert len(tuning) == before + 2, changed
    before = len(tuning)
    measured(h=H[:70])  # between 65 and 128 tokens like 100 of them
    assert len(tuning) == before


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 1}'])
def test_a_broken_file_is_measured_again(tuning, content):
    _autotune.cache_file().parent.mkdir(parents=True)
    _autotune.cache_file().write_text(content)
    assert measured() == OTHER and len(tuning) == 2


def test_a_result_of_another_shape_is_measured_again(tuning):
    measured()
    found = json.loads(_autotune.cache_file().read_text())
    _autotune.cache_file().write_text(json.dumps({key: {"BLOCK": 1} for key in found}))
    _autotune.results.cache_clear()
    assert measured() == OTHER and len(tuning) == 4


def test_what_the_chip_cannot_hold_is_passed_over(tuning, monkeypatch):
    def bench(run, **_):
        if run() == OTHER:
            raise _autotune.triton.runtime.errors.OutOfResources(300, 200, "shared memory")
        return 1.0

    monkeypatch.setattr(_autotune.triton.testing, "do_bench", bench)
    assert measured() == OWN
