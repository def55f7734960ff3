"""Run directories: what appears is complete, what fails leaves no trace, and one configuration owns a folder."""

import errno
import json

import pytest

from lockin_fast import rundir
from lockin_fast.rundir import (
    RunError,
    atomic_folder,
    check_place,
    claim,
    hash_files,
    hold,
    read_json_lines,
    write_json,
    write_json_lines,
)

ENTRY = {"config": {"train.steps": 3, "sweep.seeds": [0]}, "inputs": {"model": {"a.bin": "1"}}}


def test_json_has_no_numbers_that_json_does_not_know(tmp_path):
    write_json(tmp_path / "x.json", {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": None}, "e": tmp_path})
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": None,
        "b": [1.5, None],
        "c": {"d": None},
        "e": str(tmp_path),
    }


def test_text_with_line_breaks_of_any_kind_stays_on_its_line(tmp_path):
    rows = [{"reply": "a\nb\r\nc\u2028d\u2029e\x85f\x0bg"}, {"reply": ""}]
    write_json_lines(tmp_path / "rows.jsonl", rows)
    assert read_json_lines(tmp_path / "rows.jsonl") == rows


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", 1)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rundir.os, "fsync", full)
    with pytest.raises(OSError):
        write_json(tmp_path / "x.json", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert (tmp_path / "x.json").read_text() == "1\n"


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with atomic_folder(tmp_path / "trials" / "one") as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "file").write_text("x")
        assert not (tmp_path / "trials" / "one").exists()
    assert [path.name for path in (tmp_path / "trials").iterdir()] == ["one"]
    assert (tmp_path / "trials" / "one" / "deep" / "file").read_text() == "x"


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt()])
def test_a_folder_that_fails_leaves_no_trace(tmp_path, error):
    with pytest.raises(type(error)), atomic_folder(tmp_path / "one") as partial:
        (partial / "file").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_never_replaces_another(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "mine").write_text("x")
    with pytest.raises(OSError), atomic_folder(tmp_path / "one") as partial:
        (partial / "file").write_text("y")
    assert [path.name for path in tmp_path.rglob("*")] == ["one", "mine"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), Exception("IoError(No space left on device)")]
)
def test_a_full_disk_is_named_whoever_noticed_it(tmp_path, error):
    with (
        pytest.raises(RunError, match="one: cannot be written: .*No space left.*make room"),
        atomic_folder(tmp_path / "one"),
    ):
        raise error


def test_a_place_is_checked_without_a_trace(tmp_path):
    check_place(tmp_path / "a" / "b", 1000)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RunError, match="needs about 1,000,000,000,000.0 MB, but its disk has"):
        check_place(tmp_path / "a", 10**18)
    with pytest.raises(RunError, match="cannot be written"):
        check_place(rundir.Path("/proc/run"), 10)


def test_hashes_follow_content_and_skip_hidden_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_text("same")
    (tmp_path / "a").write_text("same")
    (tmp_path / ".hidden").write_text("x")
    hashes = hash_files(tmp_path)
    assert list(hashes) == ["a", "sub/b"] and hashes["a"] == hashes["sub/b"] == hash_files(tmp_path / "a")["a"]
    (tmp_path / "a").write_text("other")
    assert hash_files(tmp_path)["a"] != hashes["a"]


def test_a_claim_removes_what_a_kill_left_and_keeps_the_rest(tmp_path):
    run = tmp_path / "run"
    with claim(run, "sweep", ENTRY):
        pass
    (run / "trials" / ".one.partial" / "deep").mkdir(parents=True)
    (run / "trials" / "two").mkdir()
    (run / ".summary.json.partial").write_text("{")
    with claim(run, "sweep", ENTRY):
        assert sorted(path.name for path in run.rglob("*")) == [".lock", "manifest.json", "trials", "two"]


def test_a_claim_leaves_alone_what_another_still_writes(tmp_path):
    run = tmp_path / "run"
    with atomic_folder(run / "organism") as mine, claim(run, "sweep", ENTRY):
        (mine / "file").write_text("x")
    assert (run / "organism" / "file").read_text() == "x"


def test_two_writers_of_one_folder_do_not_meet_and_the_first_to_finish_wins(tmp_path):
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "one") as slow:
        (slow / "file").write_text("slow")
        with atomic_folder(tmp_path / "one") as quick:
            (quick / "file").write_text("quick")
        assert (slow / "file").read_text() == "slow"
    assert (tmp_path / "one" / "file").read_text() == "quick"
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_the_next_writer_removes_what_a_killed_one_left_of_the_same_folder(tmp_path):
    (tmp_path / ".one.abc.partial").mkdir()
    (tmp_path / ".two.abc.partial").mkdir()
    with atomic_folder(tmp_path / "one"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"one", ".two.abc.partial"}


def test_what_is_written_has_ordinary_permissions(tmp_path):
    (tmp_path / "plain").touch()
    (tmp_path / "folder").mkdir()
    write_json(tmp_path / "x.json", 1)
    with atomic_folder(tmp_path / "one"):
        pass
    assert (tmp_path / "x.json").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "one").stat().st_mode == (tmp_path / "folder").stat().st_mode


def test_a_hold_excludes_its_like_and_tolerates_claims(tmp_path):
    with hold(tmp_path, ".demo.lock"):
        with claim(tmp_path, "sweep", ENTRY):
            pass
        with pytest.raises(RunError, match="in use by another process"), hold(tmp_path, ".demo.lock"):
            pass
    with hold(tmp_path, ".demo.lock"):
        pass


def test_a_second_demo_in_the_folder_is_refused_while_the_first_lives(tmp_path, monkeypatch):
    from lockin_fast import organism
    from lockin_fast.demo import run_demo

    calls = []

    def build(out, **options):
        calls.append(out)
        with atomic_folder(out) as mine:
            (mine / "model").write_text("x")
            with pytest.raises(RunError, match="in use by another process"):
                run_demo(tmp_path / "demo", say=lambda text: None)
        assert (out / "model").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(organism, "build", build)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "demo", say=lambda text: None)
    assert len(calls) == 1


def test_commands_share_a_run_and_keep_each_others_entries(tmp_path):
    with claim(tmp_path / "run", "discover", {"config": {"x": 1}, "inputs": {}}):
        pass
    with claim(tmp_path / "run", "sweep", ENTRY):
        pass
    assert json.loads((tmp_path / "run" / "manifest.json").read_text()).keys() == {"discover", "sweep"}
    with pytest.raises(RunError, match="holds another discover: x was 1, now it is 2"):
        rundir.check_claim(tmp_path / "run", "discover", {"config": {"x": 2}, "inputs": {}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": ENTRY["config"] | {"train.steps": 4}}, "train.steps was 3, now it is 4"),
        ({"config": {"sweep.seeds": [0]}}, "train.steps was 3, now it is None"),
        ({"config": ENTRY["config"] | {"sweep.seeds": [1]}}, r"sweep.seeds was \[0\], now it is \[1\]"),
        ({"inputs": {"model": {"a.bin": "2"}}}, r"model differs \(file a.bin\)"),
        ({"inputs": {"model": {"a.bin": "1", "b.bin": "1"}}}, r"model differs \(file b.bin\)"),
        ({"inputs": {}}, "model was"),
    ],
)
def test_the_first_difference_is_named(tmp_path, change, message):
    with claim(tmp_path / "run", "sweep", ENTRY):
        pass
    with pytest.raises(RunError, match=message):
        rundir.check_claim(tmp_path / "run", "sweep", ENTRY | change, may_grow=("sweep.seeds",))
    grown = ENTRY | {"config": ENTRY["config"] | {"sweep.seeds": [0, 1]}}
    rundir.check_claim(tmp_path / "run", "sweep", grown, may_grow=("sweep.seeds",))


def test_inputs_of_a_name_that_may_grow_are_added_and_not_changed(tmp_path):
    with claim(tmp_path / "run", "sweep", ENTRY):
        pass
    added = ENTRY | {"inputs": ENTRY["inputs"] | {"latents.new": {"new.json": "3"}}}
    with pytest.raises(RunError, match="latents.new was None"):
        rundir.check_claim(tmp_path / "run", "sweep", added)
    with claim(tmp_path / "run", "sweep", added, may_grow=("latents.*",)):
        pass
    changed = ENTRY | {"inputs": ENTRY["inputs"] | {"latents.new": {"new.json": "4"}}}
    for entry, message in ((changed, r"latents.new differs \(file new.json\)"), (ENTRY, "latents.new was")):
        with pytest.raises(RunError, match=message):
            rundir.check_claim(tmp_path / "run", "sweep", entry, may_grow=("latents.*",))


@pytest.mark.parametrize("text", ["{", "[]", '{"sweep": 3}'])
def test_a_damaged_manifest_is_an_error(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(RunError, match="manifest.json cannot be read"):
        rundir.check_claim(tmp_path, "sweep", ENTRY)
