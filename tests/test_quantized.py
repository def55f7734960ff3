"""4-bit and 8-bit base models: loaded as the configuration says, and trainable whatever they did before."""

import logging
import sys

import pytest
import sweep_world
import torch
from torch import nn

from lockin_fast.config import load_config
from lockin_fast.inputs import open_inputs
from lockin_fast.quantized import is_quantized, keep_trainable
from lockin_fast.train import fine_tune

pytest.importorskip("bitsandbytes")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@pytest.mark.parametrize(("kind", "stored"), [("nf4", torch.uint8), ("int8", torch.int8)])
def test_a_quantised_base_trains_and_comes_back(world, tmp_path, kind, stored):
    config = load_config(world, [f"quantization={kind}"])
    inputs = open_inputs(config, config.sweep.latents)
    layers = [module for module in inputs.model.modules() if is_quantized(module)]
    assert len(layers) == 7 * sweep_world.LAYERS and {layer.weight.dtype for layer in layers} == {stored}
    assert inputs.model.lm_head.weight.dtype == torch.float32
    before = [layer.weight.data.clone() for layer in layers]
    results = []
    for name in "ab":
        with torch.no_grad():
            inputs.model.eval()(input_ids=torch.arange(8)[None])  # a trial answers before the next one trains
        results.append(
            fine_tune(
                inputs.model, inputs.tokenizer, inputs.dataset, tmp_path / name,
                lora=config.lora, settings=config.train, penalty=inputs.penalty("causal", 10.0),
            )
        )  # fmt: skip
    first, second = results
    assert first.history[0]["block_penalty"] == 0.0 < first.penalty
    assert first.history == second.history
    assert all(torch.equal(layer.weight.data, weight) for layer, weight in zip(layers, before, strict=True))
    assert [module for module in inputs.model.modules() if is_quantized(module)] == layers


def test_the_quantisation_is_part_of_the_runs_identity(world):
    from lockin_fast.sweep.run import SECTIONS

    assert load_config(world, ["quantization=nf4"]).identity(*SECTIONS)["quantization"] == "nf4"


def four_bit(width=64):
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(width, width, compute_dtype=torch.float32, quant_type="nf4")
    return nn.Sequential(layer.to("cpu"))


def test_answering_does_not_repack_a_model_that_will_train():
    model, x = four_bit(), torch.randn(1, 64, requires_grad=True)
    model(x).sum().backward()
    gradient, x.grad = x.grad, None
    keep_trainable(model)
    with torch.no_grad():
        model.eval()(x.detach())
    model.train()(x).sum().backward()
    assert torch.equal(x.grad, gradient)


def test_a_repacked_model_is_refused():
    model = four_bit()
    if not hasattr(model[0], "support_avx512bf16_for_cpu"):
        pytest.skip("this bitsandbytes repacks nothing")
    model(torch.randn(1, 64))
    model[0].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="model: the 4-bit weight of 0 was repacked for inference"):
        keep_trainable(model)


def test_without_bitsandbytes_the_extra_is_named(world, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"nf4 needs bitsandbytes: pip install 'lockin-fast\[quantization\]'"):
        open_inputs(load_config(world, ["quantization=nf4"]), {})
