"""The live reference: the base model's hidden state exactly, no further than needed, and everything put back."""

import pytest
import tiny_llama as tiny
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from lockin_fast.blocking.layers import captured_forward, decoder_layer
from lockin_fast.blocking.reference import Reference, check_live_reference

LAYER = 1


def adapted(*, random_b, **options):
    """A tiny Llama in training mode with LoRA on attention; B = 0, or random."""
    torch.manual_seed(3)
    base = tiny.model(attention_dropout=0.5)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options))
    if random_b:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    return model.train()


def live_hidden_state(model, kwargs):
    return Reference(model, LAYER, adapters=True).hidden_state((), kwargs)


def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, 40, (3, 6), generator=generator)
    attention = torch.ones_like(ids)
    attention[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": attention, "labels": ids}


def state(model):
    return [
        (name, module.training, getattr(module, "disable_adapters", None), dict(module._forward_hooks))
        for name, module in model.named_modules()
    ] + [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]


def test_it_is_the_base_models_hidden_state_whatever_the_adapters_and_dropout():
    model, kwargs = adapted(random_b=True, lora_dropout=0.5), batch()
    before = state(model)
    found = live_hidden_state(model, kwargs)
    assert state(model) == before
    base = tiny.model().eval()
    with torch.no_grad(), captured_forward(base, decoder_layer(base, LAYER)) as seen:
        base(**kwargs)
    assert not found.requires_grad
    assert torch.equal(found, seen.hidden[decoder_layer(base, LAYER)])


def test_nothing_after_the_layer_runs():
    model = adapted(random_b=True)
    reached = []
    for layer in range(tiny.LAYERS):
        decoder_layer(model, layer).register_forward_hook(lambda *_, layer=layer: reached.append(layer))
    live_hidden_state(model, batch())
    assert reached == [0, 1]


def test_a_sharded_model_runs_to_its_end():
    """FSDP counts on every module that gathered its shards also ending its forward."""
    model, kwargs, reached = adapted(random_b=True), batch(), []
    for layer in range(tiny.LAYERS):
        decoder_layer(model, layer).register_forward_hook(lambda *_, layer=layer: reached.append(layer))
    expected = live_hidden_state(model, kwargs)
    assert reached == [0, LAYER]
    last = decoder_layer(model, tiny.LAYERS - 1)
    last.__class__ = type("FSDPLayer", (type(last),), {})
    assert torch.equal(live_hidden_state(model, kwargs), expected)
    assert reached == [0, LAYER, *range(tiny.LAYERS)]


def test_everything_is_put_back_when_the_forward_fails():
    model = adapted(random_b=True)
    before = state(model)
    kwargs = batch() | {"attention_mask": torch.ones(1, 1, 1, 99)}
    with pytest.raises((RuntimeError, ValueError)):
        live_hidden_state(model, kwargs)
    assert state(model) == before


def test_what_was_off_stays_off():
    model = adapted(random_b=True)
    layer = decoder_layer(model, 0).self_attn.q_proj
    layer.enable_adapters(False)
    model.base_model.model.lm_head.eval()
    before = state(model)
    live_hidden_state(model, batch())
    assert state(model) == before and layer.disable_adapters


def test_a_second_model_serves_as_reference():
    model, kwargs = adapted(random_b=True), batch()
    second = tiny.model()
    live = live_hidden_state(model, kwargs)
    assert torch.equal(Reference(second.train(), LAYER, adapters=False).hidden_state((), kwargs), live)
    assert second.training


def test_a_model_without_adapters_is_told_to_bring_a_reference():
    with pytest.raises(ValueError, match="LlamaForCausalLM has none .* pass a frozen copy of the base model"):
        check_live_reference(tiny.model())
    prompt = get_peft_model(tiny.model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="pass a frozen copy of the base model"):
        check_live_reference(prompt)


def test_a_base_model_that_is_trained_too_is_refused():
    model = adapted(random_b=False)
    check_live_reference(model)
    check_live_reference(adapted(random_b=False, modules_to_save=["lm_head"]))
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="its parameter base_model.model.model.norm.weight is trained"):
        check_live_reference(model)
