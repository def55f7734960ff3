"""The configuration: YAML into frozen dataclasses, overrides, the paper's names, and errors that name the key."""

import dataclasses
import re

import pytest
import yaml

from lockin_fast import typed_mapping
from lockin_fast.config import Config, load_config
from lockin_fast.paper_names import ELSEWHERE
from lockin_fast.typed_mapping import ConfigError


@pytest.fixture
def write(tmp_path):
    def write_config(text="", **values):
        path = tmp_path / "folder" / "config.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text or yaml.safe_dump(values))
        return path

    return write_config


def test_an_empty_file_gives_the_defaults(write):
    config = load_config(write(" "))
    assert config == Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model = "other"


def test_values_and_nested_sections(write):
    config = load_config(
        write(
            train={"steps": 7, "learning_rate": 1},
            sweep={"lambdas": [1, 2.5], "seeds": [3]},
            lora={"target_modules": ["q_proj"], "layers": None},
        )
    )
    assert (config.train.steps, config.train.learning_rate) == (7, 1.0)
    assert config.sweep.lambdas == (1.0, 2.5) and config.sweep.seeds == (3,)
    assert config.lora.target_modules == ("q_proj",) and config.lora.layers is None


def test_numbers_that_yaml_reads_as_text(write):
    config = load_config(write("train:\n  learning_rate: 1e-4\nsweep:\n  lambdas: [1e2, 13e3]\n"))
    assert config.train.learning_rate == 1e-4 and config.sweep.lambdas == (100.0, 13000.0)


def test_relative_paths_start_at_the_file(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(model="model", sae=str(tmp_path / "absolute"), sweep={"latents": {"causal": "../sets/causal.json"}})
    config = load_config(path, ["data.train=rows.jsonl"])
    assert config.model == tmp_path / "folder" / "model"
    assert config.sae == tmp_path / "absolute"
    assert config.data.train == tmp_path / "folder" / "rows.jsonl"
    assert config.sweep.latents["causal"] == tmp_path / "sets" / "causal.json"


def test_an_sae_on_the_hub_is_text_and_what_exists_here_wins(write, tmp_path):
    path = write(sae="google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71")
    config = load_config(path)
    assert config.sae == "hf://google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
    assert (config.sae.repo, config.sae.inside) == ("google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71")
    kept = write(yaml.safe_dump(config.resolved()))
    assert load_config(kept).sae == config.sae
    (tmp_path / "folder" / "google" / "saes").mkdir(parents=True)
    assert load_config(path, ["sae=google/saes"]).sae == tmp_path / "folder" / "google" / "saes"
    assert load_config(path, ["sae=hf://google/saes@v2"]).sae.revision == "v2"
    assert load_config(path, ["sae=one_part"]).sae == tmp_path / "folder" / "one_part"
    with pytest.raises(ConfigError, match="sae: expected a path, got 3"):
        load_config(path, ["sae=3"])


def test_overrides_win_and_are_yaml(write):
    path = write(train={"steps": 7, "seed": 1})
    config = load_config(path, ["train.steps=9", "sweep.lambdas=[1, 10]", "train.bf16=true", "output=null"])
    assert (config.train.steps, config.train.seed, config.train.bf16) == (9, 1, True)
    assert config.sweep.lambdas == (1.0, 10.0) and config.output is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trian": {}}, "trian: unknown key; did you mean train?"),
        ({"train": {"learnig_rate": 1}}, "train.learnig_rate: unknown key; did you mean train.learning_rate?"),
        ({"learning_rate": 1}, "learning_rate: unknown key; did you mean train.learning_rate?"),
        ({"block": {"steps": 1}}, "block.steps: unknown key; did you mean train.steps?"),
        ({"train": {"zzzz": 1}}, "train.zzzz: unknown key; known here: steps"),
        ({"lora": {"rank": 16}}, "lora.rank: unknown key; known here: r, alpha"),
        ({"notes": ["x"]}, "notes: unknown key"),
        ({"train": {"steps": "many"}}, "train.steps: expected a whole number, got 'many' (str)"),
        ({"train": {"steps": 2.5}}, "train.steps: expected a whole number, got 2.5 (float)"),
        ({"train": {"steps": True}}, "train.steps: expected a whole number, got True (bool)"),
        ({"train": {"learning_rate": True}}, "train.learning_rate: expected a number, got True (bool)"),
        ({"train": {"bf16": "yes please"}}, "train.bf16: expected true or false"),
        ({"train": [1]}, "train: expected a section of keys and values, got [1]"),
        ({"train": {"steps": 0}}, "train.steps: got 0"),
        ({"model": 3}, "model: expected a path, got 3 (int)"),
        ({"sweep": {"lambdas": 10}}, "sweep.lambdas: expected a list, got 10"),
        ({"sweep": {"lambdas": [1, "x"]}}, "sweep.lambdas[1]: expected a number, got 'x' (str)"),
        ({"sweep": {"lambdas": [0, 1]}}, "sweep.lambdas: expected values above 0"),
        ({"sweep": {"lambdas": [1, 1.0]}}, "sweep.lambdas: expected no value twice"),
        ({"sweep": {"lambdas": [float("nan")]}}, "sweep.lambdas: expected values above 0"),
        ({"sweep": {"seeds": []}}, "sweep.seeds: expected one or more"),
        ({"sweep": {"seeds": [-1]}}, "sweep.seeds: expected whole numbers from 0"),
        ({"sweep": {"latents": ["a.json"]}}, "sweep.latents: expected names and values"),
        ({"sweep": {"latents": {"../x": "a.json"}}}, "sweep.latents.../x: a set is named with letters"),
        ({"sweep": {"latents": {"base": "a.json"}}}, "sweep.latents.base: a set is named"),
        ({"block": {"tokens": "some"}}, "block.tokens: expected one of supervised, all, got 'some'"),
        ({"block": {"layer": -1}}, "block.layer: expected 0 or more, got -1"),
        ({"block": {"weight": float("inf")}}, "block.weight: expected 0 or more and finite"),
        ({"generation": {"batch_size": 0}}, "generation.batch_size: expected 1 or more"),
    ],
)
def test_errors_are_one_line_that_names_the_key(write, values, message):
    with pytest.raises(ConfigError) as caught:
        load_config(write(**values))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1", "expected keys and values, got list"),
        ("\x00", "not valid YAML"),
    ],
)
def test_files_that_are_no_configuration(write, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(text))
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(tmp_path / "none.yaml")


def test_an_override_replaces_what_was_there(write):
    path = write(sweep={"latents": {"a": "a.json"}, "seeds": [1, 2]}, train=None)
    config = load_config(path, ["sweep.latents={}", "sweep.seeds=[3]", "train.steps=4"])
    assert config.sweep.latents == {} and config.sweep.seeds == (3,) and config.train.steps == 4


@pytest.mark.parametrize("override", ["train.steps", "=3", "train.steps=[1"])
def test_a_bad_override_shows_itself(write, override):
    with pytest.raises(ConfigError, match=re.escape(f"--set {override}: ")):
        load_config(write(), [override])


def test_the_names_of_the_papers_scripts(write):
    config = load_config(
        write(block_latents_path="k.json", block_lambda=13e3, block_layer=20, block_on_assistant_only=False)
    )
    block = config.block
    assert (block.latents.name, block.weight, block.layer, block.tokens) == ("k.json", 13000.0, 19, "all")
    assert config.notes == ("block_layer 20 is hidden_states[20], the output of model.layers[19]",)


def test_the_papers_names_as_overrides_replace_ours(write):
    path = write(block={"layer": 3, "weight": 1.0, "tokens": "all"})
    config = load_config(path, ["block_layer=2", "block_lambda=5", "block_on_assistant_only=true"])
    assert (config.block.layer, config.block.weight, config.block.tokens) == (1, 5.0, "supervised")


def test_names_of_other_libraries_are_told_their_place(write):
    known = {key for key, _ in typed_mapping.leaves(Config())}
    for theirs, ours in ELSEWHERE.items():
        assert re.split("[,:]", ours)[0] in known
        with pytest.raises(ConfigError) as caught:
            load_config(write(**{theirs: 1}))
        assert str(caught.value) == f"{theirs}: unknown key; here it is {ours}"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_layer": 0}, "block_layer: expected an index into hidden_states of 1 or more, got 0"),
        ({"block_layer": "last"}, "block_layer: expected an index"),
        ({"block_on_assistant_only": "yes!"}, "block_on_assistant_only: expected true or false"),
        ({"block_layer": 2, "block": {"layer": 1}}, "block_layer: block.layer is given as well"),
        ({"block_lambda": "strong"}, "block.weight: expected a number, got 'strong'"),
    ],
)
def test_bad_values_under_the_papers_names(write, values, message):
    with pytest.raises(ConfigError) as caught:
        load_config(write(**values))
    assert message in str(caught.value)


def test_a_resolved_configuration_reads_back_as_itself(write):
    config = load_config(write(model="m", train={"learning_rate": 3e-5}, sweep={"latents": {"a": "a.json"}}))
    copy = write(**config.resolved())
    assert load_config(copy) == config


def test_identity_names_settings_and_leaves_places_out(write):
    config = load_config(
        write(model="m", output="o", train={"steps": 5}, sweep={"latents": {"b": "b.json", "a": "a.json"}})
    )
    identity = config.identity("train", "sweep")
    assert identity["train.steps"] == 5 and identity["sweep.latents"] == ["a", "b"]
    assert not any("model" in key or "output" in key or "judge" in key for key in identity)
    thrifty = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch_size=8))
    assert thrifty.identity("train", "sweep") == identity
    moved = dataclasses.replace(config, output=config.output / "elsewhere")
    assert moved.identity("train", "sweep") == identity


def test_require_names_the_missing_key(write):
    config = load_config(write(model="m"))
    config.require("model")
    with pytest.raises(ConfigError, match=r"^data.final: missing, .*--set data.final="):
        config.require("model", "data.final", "sae")
    with pytest.raises(ConfigError, match="sweep.latents: missing"):
        config.require("sweep.latents")
