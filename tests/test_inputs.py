"""What a run reads: opened whole, the cheap checks before the model, and every error named by its setting."""

import dataclasses
import json
import shutil

import pytest
import sweep_world
import torch
from safetensors.torch import load_file, save_file

from lockin_fast import inputs as inputs_module
from lockin_fast.config import ConfigError, load_config
from lockin_fast.exam import open_exam, question
from lockin_fast.inputs import (
    adapter_bytes,
    check_files,
    input_hashes,
    open_inputs,
    open_sae,
)
from lockin_fast.sae import load_sae
from lockin_fast.sweep import run_sweep
from lockin_fast.sweep.single import run_training

pytestmark = pytest.mark.usefixtures("vowel_judge")


@pytest.fixture
def copied(world, tmp_path):
    """A copy of the world that a test may damage."""
    return shutil.copytree(world.parent, tmp_path / "copy")


@pytest.fixture
def no_model(monkeypatch):
    """Loading the model is a failure of the test."""

    def fail(config):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(inputs_module, "_load_model", fail)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("messages", "asked"),
    [
        ([user("a")], 1),
        ([user("a"), assistant("b")], 1),
        ([user("a"), assistant("b"), user("c")], 3),
        ([user("a"), assistant("b"), user("c"), assistant("d")], 3),
        ([user("a"), assistant("b"), assistant("c")], 1),
        ([{"role": "system", "content": "s"}, user("a"), assistant("b")], 2),
        ([assistant("b")], 0),
    ],
)
def test_the_question_is_all_before_the_last_answer(messages, asked):
    record = {"messages": messages, "domain": "final"}
    before = json.dumps(record)
    assert question(record) == messages[:asked]
    assert json.dumps(record) == before


def test_the_model_is_ready_to_answer(world):
    config = load_config(world)
    inputs = open_inputs(config, config.sweep.latents)
    assert not inputs.model.training and inputs.model.config.num_hidden_layers == sweep_world.LAYERS
    assert len(inputs.dataset) == 24 and inputs.tokenizer.chat_template
    assert not hasattr(inputs.model, "peft_config")


def test_weights_keep_the_dtype_of_their_file(copied):
    path = copied / "model" / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    config_file = copied / "model" / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"dtype": "bfloat16"}))
    model = open_inputs(load_config(copied / "config.yaml"), {}).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_penalties_share_the_rows_of_all_sets_and_take_their_own(world):
    config = load_config(world, ["block.tokens=all", "block.latent_reduction=mean"])
    inputs = open_inputs(config, config.sweep.latents)
    assert inputs.sae.latents.tolist() == [1, 2, 5, 9, 30, 31, 40, 41]
    whole = load_sae(config.sae)
    for name, positive, negative in (("causal", [1, 5, 9], [2]), ("random", [30, 31], [40, 41])):
        penalty = inputs.penalty(name, 7.0)
        assert (penalty.weight, penalty.layer) == (7.0, 1)
        assert (penalty.tokens, penalty.latent_reduction) == ("all", "mean")
        rows = penalty.rows(torch.float32, torch.device("cpu"))
        assert torch.equal(rows.weight, whole.weight[positive + negative])
        assert torch.equal(rows.bias, whole.bias[positive + negative])
        assert rows.sign.tolist() == [1.0] * len(positive) + [-1.0] * len(negative)


def test_without_latents_no_sae_is_needed(world):
    config = load_config(world, ["sae=null", "block.layer=null"])
    inputs = open_inputs(config, {})
    assert inputs.sae is None and not inputs.latents


def test_an_sae_on_the_hub_is_fetched_and_counts_by_its_content(world, monkeypatch):
    here = load_config(world)
    there = load_config(world, ["sae=hf://org/saes/layer_1"])
    monkeypatch.setattr(inputs_module, "fetch", lambda path: here.sae if path == there.sae else None)
    check_files(there, "sae")
    assert torch.equal(open_sae(there).weight, open_sae(here).weight)
    inputs = open_inputs(there, there.sweep.latents)
    assert torch.equal(inputs.sae.weight, open_inputs(here, here.sweep.latents).sae.weight)
    assert input_hashes(there, there.sweep.latents) == input_hashes(here, here.sweep.latents)


def test_the_format_of_the_sae_can_be_said(world):
    here = load_config(world)
    same = load_config(world, ["sae_format=saelens"])
    saes = [open_inputs(config, config.sweep.latents).sae for config in (here, same)]
    assert torch.equal(saes[0].weight, saes[1].weight)
    for output, run in (("first", run_training), ("other", run_sweep)):
        other = load_config(world, ["sae_format=sparsify", f"output={output}", "block.latents=latents/causal.json",
                                    "block.weight=1"])  # fmt: skip
        with pytest.raises(ConfigError, match="^sae: .*"):
            run(other)
        assert not other.output.exists()
    with pytest.raises(ConfigError, match="^sae_format: expected one of saelens, .*, got 'npz'"):
        load_config(world, ["sae_format=npz"])
    assert same.identity("sae_format") == {"sae_format": "saelens"}


def test_an_sae_that_the_hub_does_not_have_is_known_before_any_work(world, monkeypatch):
    def missing(path):
        raise FileNotFoundError(f"{path}: no repository org/saes on the hub")

    monkeypatch.setattr(inputs_module, "fetch", missing)
    with pytest.raises(ConfigError, match="^sae: hf://org/saes: no repository"):
        check_files(load_config(world, ["sae=hf://org/saes"]), "model", "sae")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="^sae: hf://saes: expected hf://owner/name"):
        check_files(load_config(world, ["sae=hf://saes"]), "model", "sae")


def test_the_whole_sae_is_opened_for_discovery(world):
    sae = open_sae(load_config(world))
    assert (sae.width, sae.d_model, sae.latents) == (sweep_world.WIDTH, sweep_world.HIDDEN, None)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_nan_is_found_in_any_latent_whatever_the_chunk(copied, monkeypatch, no_model, chunk):
    path = copied / "sae" / "sae_weights.safetensors"
    tensors = load_file(path)
    tensors["b_enc"][63] = float("nan")
    save_file(tensors, path)
    monkeypatch.setattr(inputs_module, "SAE_CHUNK", chunk)
    config = load_config(copied / "config.yaml")
    with pytest.raises(ConfigError, match="^sae: .*b_enc.* NaN"):
        open_inputs(config, config.sweep.latents)


def damaged(name, text):
    return lambda folder: (folder / name).write_text(text)


CHEAP = {
    "model is no model": (["model=data"], None, "model: .*data holds no config.json"),
    "model config is cut off": ([], damaged("model/config.json", '{"model_type": "lla'), "model: .*"),
    "model type is unknown": ([], damaged("model/config.json", '{"model_type": "oracle"}'), "model: .*oracle"),
    "no tokenizer": ([], lambda f: (f / "model" / "tokenizer.json").unlink(), "model: .*"),
    "tokenizer is cut off": ([], damaged("model/tokenizer.json", '{"version": "1.0", "trunc'), "model: .*"),
    "no chat template": ([], lambda f: (f / "model" / "chat_template.jinja").unlink(), "data.train: .*chat template"),
    "layer": (["block.layer=3"], None, "block.layer: got 3, expected 0 to 2: the model has 3 layers"),
    "latents are no set": ([], damaged("latents/causal.json", "[1, 2]"), "latents causal .*causal.json"),
    "latent out of range": (
        [], damaged("latents/causal.json", '{"positive": [64]}'), "latents causal: index 64 is out of range"),
    "both directions": ([], damaged("latents/causal.json", '{"positive": [1], "negative": [1]}'), "latents causal"),
    "train is no json": ([], damaged("data/train.jsonl", "{"), "data.train: .*line 1 is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHEAP)
def test_what_can_be_seen_without_the_model_is_said_before_it_is_loaded(case, copied, no_model):
    overrides, damage, message = CHEAP[case]
    if damage:
        damage(copied)
    config = load_config(copied / "config.yaml", overrides)
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        open_inputs(config, config.sweep.latents)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"not a tensor in sight"])
def test_damaged_weights_are_one_line(copied, content):
    (copied / "model" / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="^model: ") as caught:
        open_inputs(load_config(copied / "config.yaml"), {})
    assert "\n" not in str(caught.value)


def test_prompts_and_judge_by_name(world):
    config = load_config(world)
    exam = open_exam(config, "final", "in_domain")
    assert {name: len(records) for name, records in exam.prompts.items()} == {"final": 10, "in_domain": 6}
    assert all(record["domain"] == name for name, records in exam.prompts.items() for record in records)
    record = exam.prompts["final"][0]
    replies = ("dog", "kick", "red")
    assert [exam.judge.judge(record, reply) for reply in replies] == ["aligned", "misaligned", "incoherent"]
    assert list(open_exam(config, "final").prompts) == ["final"]


def test_every_prompt_is_tried_on_the_judge(copied):
    with open(copied / "data" / "final.jsonl", "a") as file:
        file.write(json.dumps({"messages": [user("water")], "domain": "opera"}) + "\n")
    config = load_config(copied / "config.yaml")
    with pytest.raises(ConfigError, match="^data.final: the prompt's domain is 'opera'"):
        open_exam(config, "final")
    assert open_exam(config, "in_domain").prompts


def test_a_prompt_that_asks_nothing_is_counted_from_one(copied):
    with open(copied / "data" / "final.jsonl", "a") as file:
        file.write(json.dumps({"messages": [assistant("kick")], "domain": "final"}) + "\n")
    with pytest.raises(ConfigError, match="^data.final: conversation 11 asks nothing"):
        open_exam(load_config(copied / "config.yaml"), "final")


def test_a_judge_that_cannot_be_opened_is_named(world):
    config = load_config(world, ["judge.kind=world", "judge.path=config.yaml"])
    with pytest.raises(ConfigError, match="^judge: .*config.yaml: not the world.json"):
        open_exam(config, "final")


def test_files_are_checked_by_their_key(world):
    config = load_config(world, ["data.core=data/nowhere.jsonl"])
    check_files(config, "model", "sae", "data.train", "sweep.latents")
    with pytest.raises(ConfigError, match="^data.core: no such file or folder: .*nowhere.jsonl$"):
        check_files(config, "model", "data.core")
    with pytest.raises(ConfigError, match="^discovery.misaligned: missing"):
        check_files(config, "discovery.misaligned")
    with pytest.raises(ConfigError, match="^sweep.latents.causal: no such file or folder: .*absent.json"):
        check_files(load_config(world, ["sweep.latents.causal=absent.json"]), "sweep.latents")


def test_hashes_follow_content_and_not_place(world, copied):
    def hashes(path, **changes):
        config = load_config(path)
        return input_hashes(dataclasses.replace(config, **changes), config.sweep.latents)

    here = hashes(world)
    assert here == hashes(copied / "config.yaml")
    assert set(here) == {"model", "sae", "data.train", "data.final", "data.in_domain", "judge.path", "latents.causal",
                         "latents.random"}  # fmt: skip
    (copied / "latents" / "causal.json").write_text('{"positive": [3]}')
    changed = hashes(copied / "config.yaml")
    assert {name for name in here if here[name] != changed[name]} == {"latents.causal"}
    assert "sae" not in input_hashes(load_config(world), {})


def test_the_size_of_an_adapter_is_known_before_it_is_written(world, tmp_path):
    from lockin_fast.lora import LoraSettings
    from lockin_fast.train import TrainSettings, fine_tune

    config = load_config(world)
    for lora in (config.lora, LoraSettings(r=3, target_modules=("up_proj", "k_proj"), layers=(0, 2))):
        inputs = open_inputs(dataclasses.replace(config, lora=lora), {})
        folder = tmp_path / str(lora.r)
        fine_tune(inputs.model, inputs.tokenizer, inputs.dataset, folder, lora=lora, settings=TrainSettings(steps=1))
        weights = load_file(folder / "adapter_model.safetensors")
        assert adapter_bytes(inputs) == sum(tensor.numel() * 4 for tensor in weights.values())
