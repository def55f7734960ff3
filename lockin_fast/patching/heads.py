"""The attention of every decoder layer while it runs: the one place that reads queries, keys, values and heads."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lockin_fast.blocking.layers import FINAL, decoder_layers, site_module, text_config

TWO_TOKENS = torch.tensor([[0, 1]])  # enough to see how a model is built


class AttentionCall(NamedTuple):
    """What a decoder layer gives to its attention function.

    query [B, H, T, D] and key [B, Hkv, T, D] are as they enter the product: after rotary embedding and query and key
    norms; value is [B, Hkv, T, Dv]; head h reads key head h // (H / Hkv). options: what else the layer asks for, such
    as a soft cap or a sliding window.
    """

    layer: int
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    scaling: float | None
    options: Mapping[str, Any]


See = Callable[[AttentionCall, Tensor], Tensor | None]


@contextmanager
def watched_attention(model: nn.Module, see: See) -> Iterator[None]:
    """Show every attention of `model` inside the context to `see(call, output)`.

    output: the heads' outputs [B, T, H, Dv], before the out-projection. What `see` returns, unless None, takes their
    place. The model computes as it always does, with the attention function that it was loaded with.

    Works for every architecture that asks transformers for its attention function, whatever its modules are called;
    `attention_calls` says whether a model is one. Other models may run meanwhile and are not watched; contexts nest.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = text_config(model)._attn_implementation
    layers = {module: index for index, layer in enumerate(decoder_layers(model)) for module in layer.modules()}
    outer = ALL_ATTENTION_FUNCTIONS.get(name)  # None where it is eager: each architecture then has its own

    def attention(module, query, key, value, attention_mask=None, **options):
        run = outer or sys.modules[type(module).__module__].eager_attention_forward
        output, weights = run(module, query, key, value, attention_mask, **options)
        if module in layers:
            scaling = options.get("scaling")
            call = AttentionCall(layers[module], module, query, key, value, attention_mask, scaling, options)
            replaced = see(call, output)
            output = output if replaced is None else replaced
        return output, weights

    ALL_ATTENTION_FUNCTIONS[name] = attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
        if outer is not ALL_ATTENTION_FUNCTIONS.get(name):
            ALL_ATTENTION_FUNCTIONS[name] = outer


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, without gradients; its modules' modes are put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def run_decoder(model: nn.Module, tokens: Tensor) -> Tensor:
    """Last hidden state [B, T, d] for token ids [B, T], without the unembedding, a gradient or a key-value cache."""
    device = model.get_input_embeddings().weight.device
    with evaluating(model):
        return site_module(model, FINAL)(input_ids=tokens.to(device), use_cache=False)[0]


def attention_calls(model: nn.Module) -> list[AttentionCall]:
    """One call of every layer's attention, on two tokens.

    Raises ValueError for a model with layers whose attention cannot be watched, or with other numbers of heads in some
    layers than in others.
    """
    calls: dict[int, AttentionCall] = {}
    with watched_attention(model, lambda call, output: calls.update({call.layer: call})):
        run_decoder(model, TWO_TOKENS)
    layers = len(decoder_layers(model))
    if missing := [layer for layer in range(layers) if layer not in calls]:
        raise ValueError(
            f"model: {type(model).__name__} computes the attention of {len(missing)} of its {layers} layers (layer "
            f"{missing[0]} first) without asking transformers for an attention function, so its heads cannot be read; "
            "use a model of softmax attention in every layer that supports attn_implementation='sdpa'"
        )
    found = [calls[layer] for layer in range(layers)]
    if len({call.query.shape[1] for call in found}) > 1:
        raise ValueError(
            f"model: the layers of {type(model).__name__} have {[call.query.shape[1] for call in found]} heads; "
            "expected as many in each"
        )
    return found
