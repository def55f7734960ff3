"""Shapes without weights, the arithmetic of memory and time, and what is advised."""

import dataclasses
import importlib
import json

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, LlamaForCausalLM, Qwen3Config

from lockin_fast.config import load_config
from lockin_fast.plan import make_plan, read_device, read_workload
from lockin_fast.plan import shape as shapes
from lockin_fast.plan.device import GIB, measured
from lockin_fast.plan.duration import step_parts
from lockin_fast.plan.memory import NF4_BYTES, Workload, predict, weights
from lockin_fast.plan.shape import read_shape

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def llama():
    """Llama-3.1-8B, by name: no network, no weights."""
    return read_shape("meta-llama/Llama-3.1-8B-Instruct")


@pytest.fixture
def work(llama):
    return Workload(llama, batch=64, micro_batch=4, length=1024, layer=19, autocast=True)


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-3.1-8b", 8.030), ("llama-3.2-1b", 1.236), ("tinyllama-1.1b", 1.100)]
)
def test_known_models_have_as_many_parameters_as_published(name, billions):
    assert round(read_shape(name).parameters / 1e9, 3) == billions


@pytest.mark.parametrize("tied", [False, True])
def test_the_shape_of_a_folder_is_that_of_its_model(tied, tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=tied, dtype="bfloat16"))
    model.config.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        shape = read_shape(path)
        assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert (shape.queries, shape.keys, shape.norms, shape.head_norm) == (32, 16, 2, False)
        assert shape.dtype == torch.bfloat16


def test_models_like_llama_count_and_others_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("huggingface_hub.constants"), "HF_HUB_OFFLINE", True)
    Qwen3Config(**TINY, head_dim=8).save_pretrained(tmp_path)
    assert read_shape(tmp_path).head_norm
    Gemma2Config(**TINY, head_dim=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="caps its attention scores"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2}))
    with pytest.raises(ValueError, match="is not built like Llama .its layers have"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="^model: "):
        read_shape(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        read_shape(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder, no config.json, none of llama-3.2-1b"):
        read_shape("no/such-model")


def test_no_weight_is_made(monkeypatch):
    made = []
    monkeypatch.setattr(shapes, "shape_of", lambda model, name: made.append(model))
    read_shape("llama-3.1-70b")
    assert all(parameter.is_meta for parameter in made[0].parameters())


def test_weights_of_every_quantisation(work):
    elements, rest = work.shape.linear_elements, work.shape.embedding + work.shape.other
    assert weights(work) == 2 * work.shape.parameters
    assert weights(dataclasses.replace(work, quantization="nf4")) == 2 * rest + int(NF4_BYTES * elements)
    assert weights(dataclasses.replace(work, quantization="int8")) / elements == pytest.approx(
        1 + 2 * rest / elements, rel=1e-3
    )


def test_what_makes_a_step_smaller(work):
    peak = predict(work).peak
    for change in (
        {"micro_batch": 2},
        {"length": 512},
        {"checkpointing": True},
        {"quantization": "nf4"},
        {"rank": 4},
        {"padded": False},
        {"layers": tuple(range(20, 32))},
        {"reference": "none"},
    ):
        assert predict(dataclasses.replace(work, **change)).peak < peak, change
    for change in ({"reference": "second"}, {"dora": True}, {"dropout": 0.1}, {"stack": 12}):
        assert predict(dataclasses.replace(work, **change)).peak > peak, change


def test_the_parts_of_the_peak_add_up_and_the_cache_is_on_disk(work):
    memory = predict(dataclasses.replace(work, reference="cache", latents=20))
    assert memory.peak == sum(memory.parts.values()) and memory.working == "the loss"
    assert memory.disk == 80e6, "20 latents of 4 bytes for a million tokens"
    assert predict(work).disk == 0


def test_flops_of_a_step_against_counting_them(tmp_path):
    """Base forward and backward of one micro-batch against torch's own counter of matrix products."""
    from torch.utils.flop_counter import FlopCounterMode

    config = LlamaConfig(**TINY)
    config.save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    model = LlamaForCausalLM(config).requires_grad_(False)
    embedded = torch.randn(2, 8, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embedded, labels=torch.zeros(2, 8, dtype=torch.long)).loss.backward()
    counted = counter.get_total_flops()
    work = Workload(shape, batch=2, micro_batch=2, length=8, reference="none", targets=("q_proj",))
    parts = {part.name: part.flops for part in step_parts(work)}
    attention = 2 * 8 * shape.layers * 8 * shape.queries * (2 + 5)  # on a CPU it is one operation, which nobody counts
    assert parts["base forward"] + parts["base backward"] - attention == counted


def test_parts_of_a_step_follow_the_configuration(work):
    flops = {part.name: part.flops for part in step_parts(work)}
    head = work.batch * work.length * 2 * work.shape.width * work.shape.vocabulary
    assert flops["reference forward"] / (flops["base forward"] - head) == pytest.approx(20 / 32), "layers 0 to 19"
    cached = {part.name for part in step_parts(dataclasses.replace(work, reference="cache"))}
    assert "reference forward" not in cached and "block penalty" in cached
    again = {part.name: part.flops for part in step_parts(dataclasses.replace(work, checkpointing=True))}
    assert again["forward again (checkpointing)"] < flops["base forward"]
    packed = {part.name: part.bytes for part in step_parts(dataclasses.replace(work, quantization="nf4"))}
    assert packed["base forward"] > {part.name: part.bytes for part in step_parts(work)}["base forward"]


def test_devices():
    assert read_device("24GB").memory == read_device("24 GiB").memory == read_device("rtx 4090").memory == 24 * GIB
    assert read_device("24GB").flops is None and read_device("24GB").usable < 24 * GIB
    assert read_device("NVIDIA H100", flops=1e12).flops == 1e12
    for text in ("24", "0GB", "big", "24XB"):
        with pytest.raises(ValueError, match="gpu: got .* expected a size such as 24GB, or one of t4"):
            read_device(text)
    with pytest.raises(ValueError, match="flops: got -1"):
        read_device("24GB", flops=-1)


def test_rates_of_this_machine():
    device = measured(read_device("24GB"), torch.float32)
    assert 1e8 < device.flops < 1e16 and 1e8 < device.bandwidth < 1e14 and "measured here" in device.source


def test_advice_leads_to_what_fits_in_the_order_of_its_price(work):
    tight = dataclasses.replace(work, micro_batch=64, stack=2)
    plan = make_plan(tight, read_device("24GB"))
    assert not plan.fits and plan.suggestions[0].setting == "train.micro_batch_size=1"
    assert plan.suggestions[-1].together == predict(plan.changed).peak <= plan.device.usable
    togethers = [plan.memory.peak] + [change.together for change in plan.suggestions]
    assert togethers == sorted(togethers, reverse=True) and len(set(togethers)) == len(togethers)
    assert make_plan(plan.changed, plan.device).fits and make_plan(plan.changed, plan.device).suggestions == []


def test_the_largest_micro_batch_that_fits_is_advised(work):
    plan = make_plan(dataclasses.replace(work, micro_batch=64), read_device("80GB"))
    (change,) = plan.suggestions
    size = plan.changed.micro_batch
    assert change.setting == f"train.micro_batch_size={size}" and 64 % size == 0
    assert predict(dataclasses.replace(work, micro_batch=2 * size)).peak > plan.device.usable


def test_what_cannot_fit_says_so(work):
    plan = make_plan(work, read_device("2GB"))
    assert not plan.fits and predict(plan.changed).peak > plan.device.usable
    settings = [change.setting for change in plan.suggestions]
    assert settings[:3] == ["train.micro_batch_size=1", "train.gradient_checkpointing=true", "quantization=nf4"]


def test_every_advice_is_a_setting_that_a_configuration_takes(work):
    plan = make_plan(dataclasses.replace(work, micro_batch=64, stack=16, length=64), read_device("2GB"))
    for change in plan.suggestions:
        key, value = change.setting.split("=")
        section = load_config(None, [change.setting, "train.batch_size=64", "cache.path=cache"])
        for part in key.split("."):
            section = getattr(section, part)
        assert str(section).lower() == value


def test_a_workload_is_what_the_configuration_trains(tmp_path):
    LlamaConfig(**TINY).save_pretrained(tmp_path)
    config = load_config(
        None,
        ["lora.r=4", "lora.layers=[1, 2]", "train.batch_size=8", "train.micro_batch_size=2", "train.bf16=true"]
        + ["train.max_length=77", "quantization=nf4", "block.layer=2", "discovery.latents=7", "sweep.stack=3"]
        + ["train.gradient_checkpointing=true", "lora.use_dora=true"],
    )
    work = read_workload(config, tmp_path, reference="none")
    assert (work.rank, work.layers, work.batch, work.micro_batch, work.length) == (4, (1, 2), 8, 2, 77)
    assert work.autocast and work.checkpointing and work.dora and work.quantization == "nf4" and work.stack == 3
    assert (work.layer, work.latents, work.reference) == (2, 7, "none")
    with pytest.raises(ValueError, match="no qkv_proj"):
        read_workload(load_config(None, ["lora.target_modules=[qkv_proj]"]), tmp_path)
    with pytest.raises(ValueError, match="layer 3 is out of range; the model has 3, 0 to 2"):
        read_workload(load_config(None, ["block.layer=3"]), tmp_path)
    with pytest.raises(ValueError, match="reference: got 'disk', expected one of live"):
        read_workload(load_config(None), tmp_path, reference="disk")
