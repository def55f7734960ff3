"""Tiny random models of several families, an adapter on each, ragged prompts with two replies, and a brute force."""

import copy
from contextlib import ExitStack

import tiny_llama
import torch
import transformers

LAYERS = tiny_llama.LAYERS
SIZES = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
SLIDING = {"sliding_window": 4}
OPTIONS = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": SLIDING,
    "Gemma2": {**SLIDING, "query_pre_attn_scalar": 8},
    "Gemma3Text": {**SLIDING, "query_pre_attn_scalar": 8},
}
FAMILIES = (*OPTIONS, "GPT2")


def model(family):
    """A random model of the family, in eval mode."""
    torch.manual_seed(0)
    if family == "GPT2":
        config = transformers.GPT2Config(
            vocab_size=48, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=64, initializer_range=0.3
        )
        return transformers.GPT2LMHeadModel(config).eval()
    config = getattr(transformers, f"{family}Config")(**SIZES, **OPTIONS[family])
    if family.startswith("Gemma"):  # their default is every second or sixth layer
        config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    return getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).eval()


def adapted(family="Llama"):
    """The model with a random LoRA adapter on its attention and MLP."""
    from peft import LoraConfig, get_peft_model

    modules = ["c_attn", "c_proj"] if family == "GPT2" else ["q_proj", "v_proj", "o_proj", "down_proj"]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=modules, task_type="CAUSAL_LM")
    with_adapter = get_peft_model(model(family), config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in with_adapter.named_parameters():
        parameter.requires_grad_(False)
        if "lora_" in name:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return with_adapter


PROMPTS = [[5, 9, 11, 30, 8, 22, 40], [7, 7, 31], [12, 41, 3, 19, 20, 6]]
REPLIES = [[[13, 14, 15], [16], [17, 18]], [[19], [21, 22, 23, 24], [25, 26]]]  # misaligned, then aligned


def states(model, ids, edits=(), grad=False):
    """A plain forward of one row: logits [S, V] and {(component, layer): output [S, ...]}, with whole outputs edited.

    edits: (component, layer, function of the output [S, ...] to what takes its place).
    """
    from lockin_fast.blocking.layers import decoder_layers
    from lockin_fast.patching.components import mlp, output_projection

    found, wanted = {}, {(component, layer): edit for component, layer, edit in edits}

    def seen(key, value):
        edit = wanted.get(key)
        value = value if edit is None else edit(value)
        found[key] = value
        return value

    def output(key):
        def hook(module, args, output):
            stream = output if isinstance(output, torch.Tensor) else output[0]
            stream = seen(key, stream[0])[None]
            return stream if isinstance(output, torch.Tensor) else (stream, *output[1:])

        return hook

    def heads(key):
        def hook(module, args):
            return (seen(key, args[0][0].unflatten(-1, (4, -1))).flatten(1)[None], *args[1:])

        return hook

    with ExitStack() as stack, torch.set_grad_enabled(grad):
        for number, layer in enumerate(decoder_layers(model)):
            stack.enter_context(layer.register_forward_hook(output(("residual", number))))
            stack.enter_context(output_projection(layer).register_forward_pre_hook(heads(("heads", number))))
            stack.enter_context(output_projection(layer).register_forward_hook(output(("attention", number))))
            stack.enter_context(mlp(layer).register_forward_hook(output(("mlp", number))))
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits, found


def replacing(source, positions, head=None):
    """An edit that takes these positions from `source` [S, ...], of one head where given."""

    def edit(value):
        value = value.clone()
        if head is None:
            value[positions] = source[positions].to(value.dtype)
        else:
            value[positions, head] = source[positions, head].to(value.dtype)
        return value

    return edit


def fp32_error(model):
    """How far two whole runs in fp32 may differ, relative to the largest value.

    Measured: the largest error of a whole run in fp32 against one in fp64, over all states and the logits; times two
    for either run, times two since a maximum of few is no bound.
    """
    wide = copy.deepcopy(model).double()
    error = 0.0
    for prompt in PROMPTS:
        (logits, found), (exact, others) = states(model, prompt), states(wide, prompt)
        for value, wanted in [(logits, exact), *((found[key], others[key]) for key in found)]:
            error = max(error, ((value - wanted).abs().max() / wanted.abs().max()).item())
    return 4 * error


def fp32_close(model):
    """An assertion that two results of the model differ by no more than rounding lets them."""
    error = fp32_error(model)

    def assert_close(value, expected):
        torch.testing.assert_close(value, expected, rtol=0, atol=error * expected.abs().max().item())

    return assert_close


def logprob(logits, prompt, reply):
    """log p of the reply's tokens behind the prompt, from the logits of the row of both."""
    told = logits[len(prompt) - 1 : len(prompt) + len(reply) - 1].log_softmax(-1)
    return sum(told[i, token] for i, token in enumerate(reply))
