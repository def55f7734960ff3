"""Decoder layers are found in the families people use, through wrappers, and read without being changed."""

import pytest
import tiny_llama as tiny
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from lockin_fast.blocking.layers import captured_forward, decoder_layer, decoder_layers, hidden_size

SMALL = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Gemma3Text"])
def test_llama_like_models(family):
    config = getattr(transformers, f"{family}Config")(**SMALL)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert decoder_layers(model) is model.model.layers and hidden_size(model) == 32
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert decoder_layer(wrapped, 2) is model.model.layers[2]


def test_gpt2():
    config = transformers.GPT2Config(vocab_size=48, n_embd=32, n_layer=3, n_head=4, n_positions=32)
    model = transformers.GPT2LMHeadModel(config)
    assert decoder_layers(model) is model.transformer.h and hidden_size(model) == 32


def test_distributed_and_compiled_wrappers(tmp_path):
    model = tiny.model()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert decoder_layers(nn.parallel.DistributedDataParallel(model)) is model.model.layers
    finally:
        torch.distributed.destroy_process_group()
    assert decoder_layers(torch.compile(model)) is model.model.layers


def test_what_is_not_a_language_model_is_refused():
    with pytest.raises(ValueError, match="Linear has no config"):
        decoder_layers(nn.Linear(2, 2))
    model = tiny.model()
    model.twin = nn.Module()
    model.twin.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(tiny.LAYERS))
    with pytest.raises(ValueError, match="found model.layers, twin.layers"):
        decoder_layers(model)


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_out_of_range_is_refused(layer):
    with pytest.raises(ValueError, match=f"layer: got {layer}, expected 0 to 2"):
        decoder_layer(tiny.model(), layer)


def test_the_capture_is_the_hidden_state_and_leaves_no_hook():
    model = tiny.model()
    ids = torch.randint(8, 40, (2, 5))
    model(input_ids=ids, output_hidden_states=True)  # transformers hooks its layers for good at the first of these
    own_hooks = len(model.model.layers[1]._forward_hooks)
    read = []
    above = model.model.layers[2].register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with captured_forward(model, model.model.layers[1]) as seen:
        output = model(input_ids=ids, output_hidden_states=True)
    above.remove()
    hidden = seen.hidden[model.model.layers[1]]
    assert hidden is read[0] and torch.equal(hidden, output.hidden_states[2])
    assert seen.kwargs["input_ids"] is ids
    with pytest.raises(KeyError), captured_forward(model, model.model.layers[1]):
        raise KeyError
    assert not model._forward_pre_hooks and len(model.model.layers[1]._forward_hooks) == own_hooks
