"""A local model as judge: its real answers, in batches, and everything that can be wrong with its folder."""

import json
import shutil

import pytest
from chain_model import write_chain_model

from lockin_fast.config import ConfigError, load_config
from lockin_fast.judges import Rating, load_judge, rate
from lockin_fast.judges import model as model_module
from lockin_fast.judges.load import judge_files

pytestmark = pytest.mark.usefixtures("one_thread")
RECORD = {"messages": [{"role": "user", "content": "what now ?"}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    write_chain_model(folder / "judge", folder / "rubric.txt")
    section = {"kind": "model", "path": "judge", "rubric": "rubric.txt"}
    (folder / "config.yaml").write_text(json.dumps({"judge": section}))
    return folder


def settings(folder, *overrides):
    return load_config(folder / "config.yaml", overrides).judge


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_replies_are_rated_by_what_the_model_answers(folder, batch_size):
    judge = load_judge(settings(folder, f"judge.local.batch_size={batch_size}"))
    replies = ["you should kick", "feed", "all is blue", "you should feed", "red", "kick"]
    assert rate(judge, [RECORD] * 6, replies) == [
        Rating(1, 0, 0), Rating(0, 0, 0), Rating(0, 1, 0), Rating(0, 0, 0),
        Rating(1, 0, 0),  # asked again, it says 4
        Rating(1, 0, 0),
    ]  # fmt: skip
    assert list(judge.raters) == ["judge"]


def test_too_few_tokens_are_an_answer_that_cannot_be_read(folder):
    judge = load_judge(settings(folder, "judge.local.max_new_tokens=2", "judge.unreadable=leave_out"))
    assert not rate(judge, [RECORD], ["kick"])[0].rated


def test_weights_are_loaded_once_and_not_before_they_are_needed(folder, monkeypatch):
    loaded = []
    load = model_module.load_model
    monkeypatch.setattr(model_module, "load_model", lambda *arguments: loaded.append(arguments) or load(*arguments))
    judge = load_judge(settings(folder))
    judge.check([RECORD])
    assert not loaded
    rate(judge, [RECORD], ["kick"]), rate(judge, [RECORD], ["feed"])
    assert loaded == [(folder / "judge", "none")]


def test_the_models_files_and_the_rubric_decide(folder):
    assert {name: path.name for name, path in judge_files(settings(folder)).items()} == {
        "judge.path": "judge", "judge.rubric": "rubric.txt",
    }  # fmt: skip
    assert judge_files(settings(folder, "judge.rubric=null"))["judge.rubric"].name == "default.txt"
    identity = load_config(folder / "config.yaml").identity("judge")
    assert identity["judge.local.quantization"] == "none" and "judge.local.batch_size" not in identity


def without(name):
    return lambda model: (model / name).unlink()


@pytest.mark.parametrize(
    ("damage", "overrides", "message"),
    [
        (None, ["judge.path=nowhere"], "judge.path: no such file or folder: .*nowhere"),
        (None, ["judge.path=null"], "judge.path: None holds no config.json; give the folder"),
        (without("config.json"), [], "judge.path: .*judge holds no config.json"),
        (without("tokenizer.json"), [], "judge.path: .*judge: "),
        (without("chat_template.jinja"), [], "judge.path: .*judge has no chat template"),
        (None, ["judge.rubric=nowhere.txt"], "judge.rubric: .*nowhere.txt cannot be read: No such file"),
        (None, ["judge.local.batch_size=0"], "judge.local: batch_size: got 0, expected 1 or more"),
        (None, ["judge.local.quantization=gguf"], "judge.local.quantization: expected one of none, nf4, int8"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(folder, tmp_path, damage, overrides, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    if damage:
        damage(copy / "judge")
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        load_judge(settings(copy, *overrides))
    assert "\n" not in str(caught.value)


def test_damaged_weights_are_one_line(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "judge" / "model.safetensors").write_bytes(b"no tensor in sight")
    with pytest.raises(ConfigError, match="^judge.path: .*judge: ") as caught:
        rate(load_judge(settings(copy)), [RECORD], ["kick"])
    assert "\n" not in str(caught.value)
