"""mean_shift and steered against the plainest code that does the same."""

import dataclasses

import pytest
import tiny_llama
import torch
from torch import nn

from lockin_fast.blocking.layers import decoder_layer
from lockin_fast.discovery.shift import mean_shift
from lockin_fast.steering import steered


def adapted_model(seed=0):
    """A tiny Llama with a LoRA adapter that changes it."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama.model(seed), LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def hidden_states(model, layer, ids):
    """The output [S, d] of decoder layer `layer` in an ordinary forward."""
    found = []
    handle = decoder_layer(model, layer).register_forward_hook(
        lambda module, inputs, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(ids)
    handle.remove()
    return found[0][0] if found[0].dim() == 3 else found[0]


def conversations():
    rows = [row["messages"] for row in tiny_llama.conversations(6)]
    return [*rows, [{"role": "system", "content": "w1 w2 w3"}, *rows[0]]]


@pytest.mark.parametrize("layer", range(tiny_llama.LAYERS))
@pytest.mark.parametrize("normalization", ["none", "constant_norm_rescale", "layer_norm"])
def test_mean_shift_is_the_difference_of_two_full_encodes(layer, normalization):
    model, tokenizer = adapted_model(), tiny_llama.tokenizer()
    sae = dataclasses.replace(tiny_llama.sae(), normalization=normalization)
    seen = []
    options = {"batch_size": 3, "step_done": lambda *step: seen.append(step)}
    shift = mean_shift(model, tokenizer, conversations(), sae, layer, **options)
    assert shift.dtype == torch.float64 and shift.shape == (tiny_llama.LATENTS,)
    assert seen == [(3, 7), (6, 7), (7, 7)]

    expected = torch.zeros(tiny_llama.LATENTS, dtype=torch.float64)
    for messages in conversations():
        text = tokenizer.apply_chat_template([m for m in messages if m["role"] != "system"], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        tuned = hidden_states(model, layer, ids)
        with model.disable_adapter():
            base = hidden_states(model, layer, ids)
        z, z_base = (torch.relu(sae.normalize(h) @ sae.weight.T + sae.bias).double() for h in (tuned, base))
        expected += (z - z_base).mean(0)  # every conversation counts the same, however long
    torch.testing.assert_close(shift, expected / 7, rtol=1e-5, atol=1e-6)
    assert shift.abs().max() > 1e-3 and (shift > 0).any() and (shift < 0).any()


def test_an_adapter_that_changes_nothing_shifts_nothing():
    model = adapted_model()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    shift = mean_shift(model, tiny_llama.tokenizer(), conversations(), tiny_llama.sae(), 1)
    assert not shift.any()


def test_the_model_is_left_as_it_was():
    model = adapted_model().train()
    ids = torch.arange(6)[None]
    before = model.eval()(ids).logits
    model.train()
    mean_shift(model, tiny_llama.tokenizer(), conversations(), tiny_llama.sae(), 1)
    assert all(module.training for module in model.modules())
    assert torch.equal(model.eval()(ids).logits, before)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_out_of_range_is_named():
    with pytest.raises(ValueError, match="layer: got 3, expected 0 to 2"):
        mean_shift(adapted_model(), tiny_llama.tokenizer(), conversations(), tiny_llama.sae(), 3)


class Layer(nn.Module):
    """A decoder layer as transformers has them: some return the hidden state, some a tuple that begins with it."""

    def __init__(self, as_tuple):
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, x):
        return (x, "cache") if self.as_tuple else x


@pytest.mark.parametrize("as_tuple", [True, False])
def test_steering_adds_exactly_the_vector_to_every_position_of_its_rows(as_tuple):
    layer, x = Layer(as_tuple), torch.randn(3, 5, 8)
    vectors = torch.randn(3, 8)
    vectors[1] = 0
    with steered(layer, vectors):
        output = layer(x)
    hidden = output[0] if as_tuple else output
    assert not as_tuple or output[1] == "cache"
    for row in range(3):
        for position in range(5):
            assert torch.equal(hidden[row, position], x[row, position] + vectors[row])
    assert torch.equal(hidden[1], x[1])
    again = layer(x)
    assert (again[0] if as_tuple else again) is x


def test_steering_keeps_the_streams_dtype():
    layer, x = Layer(False), torch.randn(1, 2, 4).bfloat16()
    vector = torch.randn(1, 4)
    with steered(layer, vector):
        output = layer(x)
    assert output.dtype == torch.bfloat16 and torch.equal(output, x + vector[:, None].bfloat16())


def test_steering_ends_when_the_block_fails():
    layer, x = Layer(False), torch.randn(1, 2, 4)
    with pytest.raises(KeyError), steered(layer, torch.ones(1, 4)):
        raise KeyError
    assert layer(x) is x


def test_steering_reaches_the_layers_above_and_no_other_row():
    model, ids = tiny_llama.model().eval(), torch.arange(12).view(3, 4)
    vectors = torch.zeros(3, tiny_llama.WIDTH)
    vectors[2] = 1.0
    with torch.no_grad():
        plain = model(ids).logits
        with steered(model.model.layers[1], vectors):
            changed = model(ids).logits
    assert torch.equal(changed[:2], plain[:2]) and not torch.isclose(changed[2], plain[2]).all(-1).any()
