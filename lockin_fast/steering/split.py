"""A model run in two parts, below and above the end of one decoder layer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lockin_fast.blocking.layers import decoder_layers, is_compiled, is_sharded, residual_stream, text_config, unwrap
from lockin_fast.steering.key_values import KeyValues, Reached, masks

ARCHITECTURES = (
    "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2",
    "qwen3", "qwen3_moe", "smollm3", "starcoder2",
)  # fmt: skip
KINDS = {"full_attention", "sliding_attention"}


def why_not_split(model: Any) -> str | None:
    """Why `SplitModel` does not take this model, None when it does.

    It takes architectures that are known, by tests, to look at a token's states only through its position, a mask that
    is given and the cache.
    """
    config = text_config(model)
    if config.model_type not in ARCHITECTURES:
        return f"{config.model_type} is not among the architectures {', '.join(ARCHITECTURES)}"
    if config is not unwrap(model).config:
        return f"{unwrap(model).config.model_type} is a wrapper of several models"
    if config._attn_implementation not in ("eager", "sdpa"):
        return f"attention {config._attn_implementation!r} takes no mask of its own for every row; eager and sdpa do"
    if not set(_kinds(config)) <= KINDS or getattr(config, "use_bidirectional_attention", False):
        return f"it has layers of the kinds {', '.join(sorted(set(_kinds(config))))}, or bidirectional attention"
    if {"dynamic", "longrope"} & set(_rope_types(getattr(config, "rope_parameters", None))):
        return "its rotary embedding depends on the longest row of a batch"
    if is_sharded(model) or is_compiled(model):
        return "it is sharded by FSDP or compiled, and cannot be stopped at a layer"
    for adapter in getattr(unwrap(model), "peft_config", {}).values():
        if adapter.is_prompt_learning or getattr(adapter, "alora_invocation_tokens", None):
            return f"its adapter of the type {adapter.peft_type} changes the prompt, not the weights alone"
    return None


class SplitModel:
    """Runs layers 0 to `layer` of a model, or all that comes after them, by the model's own modules.

    Nothing is rebuilt: for the time of a call, the lower layers' `forward` either cuts the model short after the last
    of them, or hands over the states it is given. Embeddings, rotary positions, norms and unembedding are the model's.
    """

    def __init__(self, model: Any, layer: int):
        model = unwrap(model)
        self._model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._config = text_config(model)
        self._kinds = sorted(set(_kinds(self._config)))
        embedding = model.get_input_embeddings().weight
        self.device = embedding.device
        # Boolean masks fit whatever dtype the attention computes in; eager attention can only add.
        self._additive = embedding.dtype if self._config._attn_implementation == "eager" else None
        layers = decoder_layers(model)
        self._lower = list(layers)[: layer + 1]
        self.top = len(layers) - 1
        self.nothing_above = layer == self.top
        self._given: Tensor | None = None
        self._found: Tensor | None = None
        self._tuples = False  # what layers of this model return, known from the first run below
        self._stand_ins = [self._standing_in(module, module.forward) for module in self._lower]

    def below(self, ids: Tensor, positions: Tensor, cache: KeyValues) -> Tensor:
        """Hidden states [n, S, d] after `layer` of tokens [n, S] at positions [n, S], or [1, S] where rows agree."""
        self._given = None
        self._run(ids, positions, cache)
        return self._found

    def above(self, hidden: Tensor, positions: Tensor, cache: KeyValues) -> Tensor | None:
        """Logits [n, S, V], given the states [n, S, d] after `layer`; None when the cache stops it."""
        self._given = hidden
        ids = torch.zeros(1, hidden.shape[1], dtype=torch.int64, device=self.device)  # embedded, and not looked at
        output = self._run(ids, positions, cache)
        self._given = None
        return None if output is None else output.logits

    def _run(self, ids: Tensor, positions: Tensor, cache: KeyValues) -> Any:
        window = getattr(self._config, "sliding_window", None)
        mask = masks(self._kinds, window, positions, cache.length, self._additive)
        own = [module.__dict__.get("forward") for module in self._lower]
        try:
            for module, stand_in in zip(self._lower, self._stand_ins, strict=True):
                module.forward = stand_in
            return self._model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
        except Reached:
            return None
        finally:
            for module, forward in zip(self._lower, own, strict=True):
                if forward is None:
                    del module.forward
                else:  # accelerate has put one there
                    module.forward = forward

    def _standing_in(self, module: Any, forward: Any) -> Any:
        last = module is self._lower[-1]

        def stand_in(hidden: Tensor, *args, **kwargs):
            if self._given is not None:
                passed = self._given if last else hidden
                return (passed,) if self._tuples else passed
            output = forward(hidden, *args, **kwargs)
            if last:
                self._found, self._tuples = residual_stream(output), isinstance(output, tuple)
                raise Reached
            return output

        return stand_in


def _kinds(config: Any) -> list[str]:
    """The kind of attention of every layer; models without a list have one kind."""
    window = getattr(config, "sliding_window", None)
    return getattr(config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"]


def _rope_types(parameters: Any) -> list[str]:
    """Every "rope_type" in the rotary settings, which some models have for each kind of layer."""
    if not isinstance(parameters, Mapping):
        return []
    inner = [kind for value in parameters.values() for kind in _rope_types(value)]
    return [parameters["rope_type"], *inner] if "rope_type" in parameters else inner
