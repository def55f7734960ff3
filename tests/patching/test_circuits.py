"""The whole of it on the model with a head built for induction: what is found, kept, resumed and refused."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from attention_models import INDUCTION_HEAD, WORDS, build, induction_model  # noqa: E402

from lockin_fast.circuit_settings import CircuitSettings  # noqa: E402
from lockin_fast.config import Config, ConfigError, load_config  # noqa: E402
from lockin_fast.patching.circuits import find_checkpoints, run_circuits  # noqa: E402
from lockin_fast.rundir import RunError  # noqa: E402

SETTINGS = CircuitSettings(length=5, sequences=3, seeds=(0, 1), thresholds=(0.05, 0.5, 0.999), draws=3)


def save(folder, model):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<s>": 0} | {f"w{i}": i for i in range(1, WORDS)}, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>").save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The model, and three checkpoints in which its induction head comes to be: it asks for nothing, a little, all."""
    folder = tmp_path_factory.mktemp("circuits")
    for step, share in ((0, 0.0), (50, 0.05), (200, 1.0)):
        model = induction_model()
        with torch.no_grad():
            model.transformer.h[1].attn.c_attn.weight[:, :WORDS] *= share
        save(folder / "checkpoints" / f"step-{step:06d}", model)
    (folder / "checkpoints" / "notes").mkdir()
    save(folder / "model", induction_model())
    return folder


def config(world, output, **settings):
    return Config(
        model=world / "model",
        output=output,
        circuits=dataclasses.replace(SETTINGS, checkpoints=world / "checkpoints", **settings),
    )


@pytest.fixture(scope="module")
def found(world, tmp_path_factory):
    seen = []
    file = run_circuits(config(world, tmp_path_factory.mktemp("run")), lambda *row: seen.append(row))
    stages = {name: [done for stage, done, _ in seen if stage == name] for name, _, _ in seen}
    assert stages == {"head scores": [0, 1, 2, 3, 4], "recovery": [0, 1, 2], "checkpoints": [0, 1, 2, 3]}
    return json.loads(file.read_text())


def test_the_head_is_found_and_does_it(found):
    layer, head = INDUCTION_HEAD
    assert (found["layers"], found["heads"], found["seeds"]) == (2, 2, [0, 1])
    assert found["prefix"][layer][head] > 0.99 and found["error"][layer][head] < 0.01
    assert found["copying"][layer][head] == 1 and found["copying"][0][1] is None  # writes nothing
    assert found["copying_refused"] is None and found["copying_folded"][layer][head] > 0.9
    assert found["gain"] > 1 and found["gain_error"] < 0.5 * found["gain"]
    low, middle, high = found["thresholds"]
    assert [len(row["heads"]) for row in found["thresholds"]] == sorted(
        (len(row["heads"]) for row in found["thresholds"]), reverse=True
    )
    assert low["threshold"] == 0.05 and [layer, head] in low["heads"] and len(low["heads"]) > 2
    assert low["random"] is None  # fewer heads are left than it has
    assert middle["heads"] == [[layer, head]]
    assert middle["recovery"] > 0.99 and middle["error"] < 0.01
    random = middle["random"]
    assert random["draws"] == 3 and random["low"] <= random["mean"] <= random["high"] < 0.05
    assert high["heads"] in ([], [[layer, head]])


def test_onset(found):
    steps = [row["step"] for row in found["onset"]]
    scores = [row["prefix"][1][0] for row in found["onset"]]
    gains = [row["gain"] for row in found["onset"]]
    assert steps == [0, 50, 200] and scores == sorted(scores) and scores[0] < 0.2 and scores[2] > 0.99
    assert gains == sorted(gains) and gains[2] > 2 * gains[0]  # a head that looks everywhere repeats some word or other
    assert gains[2] == pytest.approx(found["gain"], rel=1e-5)


def test_what_is_finished_is_not_done_again_and_checkpoints_may_be_added(world, tmp_path, found):
    output = tmp_path / "run"
    first = Config(model=world / "model", output=output, circuits=SETTINGS)
    file = run_circuits(first)
    assert json.loads(file.read_text()) == {**found, "onset": []}
    before = file.stat().st_mtime_ns
    run_circuits(first, dies)
    assert file.stat().st_mtime_ns == before
    kept = {path: path.stat().st_mtime_ns for path in (output / "circuits").glob("*.json")}
    seen = set()
    run_circuits(config(world, output), lambda *row: seen.add(row[0]))
    assert json.loads(file.read_text()) == found
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    with pytest.raises(RunError, match="holds another circuits: circuits.draws was 3, now it is 4"):
        run_circuits(config(world, output, draws=4))


def test_killed_it_goes_on_where_it_stood(world, tmp_path, found):
    run = subprocess.run(
        [sys.executable, __file__, str(world), str(tmp_path / "run")], capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    parts = tmp_path / "run" / "circuits"
    kept = {path.name: path.stat().st_mtime_ns for path in parts.rglob("*.json")}
    assert kept.keys() == {"prefix-0.json", "prefix-1.json", "copying.json", "copying-folded.json", "recovery-0.json"}
    file = run_circuits(config(world, tmp_path / "run"))
    assert {path.name: path.stat().st_mtime_ns for path in parts.glob("*.json") if path.name in kept} == kept
    again = json.loads(file.read_text())
    assert again == found


def dies(stage, done, total):
    """Kills the process in the second half of the recovery."""
    if (stage, done) == ("recovery", 1):
        os.kill(os.getpid(), signal.SIGKILL)


def test_recovery_means_nothing_where_the_copy_helps_nothing(world, tmp_path):
    model = induction_model()
    with torch.no_grad():
        model.transformer.h[1].attn.c_proj.weight.zero_()
    save(tmp_path / "model", model)
    file = run_circuits(Config(model=tmp_path / "model", output=tmp_path / "run", circuits=SETTINGS))
    found = json.loads(file.read_text())
    assert abs(found["gain"]) < 1e-6 and found["prefix"][INDUCTION_HEAD[0]][INDUCTION_HEAD[1]] > 0.99
    assert all(row["recovery"] is None and row["random"] is None for row in found["thresholds"])


def test_a_model_without_induction_heads(world, tmp_path):
    silent = world / "checkpoints" / "step-000000"
    settings = dataclasses.replace(SETTINGS, thresholds=(0.9, 1.0), checkpoints=world / "checkpoints")
    found = json.loads(run_circuits(Config(model=silent, output=tmp_path, circuits=settings)).read_text())
    assert all(row["heads"] == [] and row["recovery"] is None for row in found["thresholds"])
    assert found["gain"] == pytest.approx(found["onset"][0]["gain"], rel=1e-5)


def test_errors_come_before_any_file(world, tmp_path):
    output = tmp_path / "run"

    def refused(match, error=ConfigError, **changes):
        with pytest.raises(error, match=match):
            run_circuits(dataclasses.replace(config(world, output), **changes))
        assert not output.exists()

    refused("^output: missing", output=None)
    refused("^model: missing", model=None)
    refused("^model: no such file or folder", model=world / "nothing")
    longer = dataclasses.replace(SETTINGS, length=6)
    refused("^circuits.length: got 6 tokens a copy, expected 2 to 5", circuits=longer)
    eager = build("gpt2", n_positions=8)
    save(tmp_path / "short", eager)
    refused("^model: tokens: sequences of 11 tokens, but GPT2LMHeadModel has 8", model=tmp_path / "short")
    for folder, match in (
        (world / "nothing", "no such folder"),
        (world / "model", "holds no folder whose name ends in a step"),
    ):
        refused(
            f"^circuits.checkpoints: .*{match}", circuits=dataclasses.replace(SETTINGS, checkpoints=folder)
        )
    (tmp_path / "steps" / "step-5").mkdir(parents=True)
    with pytest.raises(ConfigError, match="step-5 holds no config.json"):
        find_checkpoints(tmp_path / "steps")
    for name in ("step-5", "late-5"):
        (tmp_path / "steps" / name).mkdir(exist_ok=True)
        (tmp_path / "steps" / name / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="late-5 and step-5 are one step"):
        find_checkpoints(tmp_path / "steps")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("length", 1, "2 or more"), ("sequences", 0, "1 or more"), ("seeds", [], "one or more"),
        ("seeds", [1, 1], "none twice"), ("seeds", [-1], r"0 to 2\^31 - 1"), ("thresholds", [], "one or more"),
        ("thresholds", [0.5, 0.5], "none twice"), ("thresholds", [0.0], "above 0, up to 1"),
        ("thresholds", [1.1], "above 0, up to 1"), ("draws", 0, "1 or more"), ("batch_size", 0, "1 or more"),
    ],
)  # fmt: skip
def test_settings(name, value, expected):
    with pytest.raises(ConfigError, match=rf"^circuits.{name}: got .*, expected .*{expected}"):
        load_config(None, [f"circuits.{name}={json.dumps(value)}"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_circuits(config(Path(sys.argv[1]), Path(sys.argv[2])), dies)
