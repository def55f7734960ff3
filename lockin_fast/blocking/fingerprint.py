"""What of a model a hidden state depends on: short enough to keep beside a cache, and it tells models apart."""

import hashlib
import json
import re
from typing import Any

import torch
from torch import Tensor, nn

from lockin_fast.blocking.layers import decoder_layer, decoder_layers, text_config, unwrap
from lockin_fast.blocking.reference import adapter_modules
from lockin_fast.cache import TokenStore
from lockin_fast.cache.manifest import REMEDY, check_same

SAMPLED = 1024  # elements of a tensor whose places count too; the sum over all does not tell their order
# Names and versions, special tokens, what shapes outputs, initial weights and training; precision is in the tensors.
_NO_MATTER = re.compile(
    r"_.*|.*_token_id|.*version|architectures|auto_map|.*dtype|quantization_config|tie_word_embeddings|"
    r"use_cache|return_dict|output_.*|initializer_.*|.*dropout.*|.*pdrop|id2label|label2id|problem_type|task_specific.*|"
    r"is_encoder_decoder|chunk_size_feed_forward|pretraining_tp|finetuning_task|use_return_dict"
)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def model_key(model: nn.Module, layer: int, autocast: str = "no") -> dict[str, Any]:
    """The base model up to decoder layer `layer` as a cache's key: layer, autocast, quantization, config, model.

    "model" maps each parameter and buffer (such as the frequencies of a rotary embedding) that the layer's output
    depends on, under the name it has without adapters, to a digest of shape, dtype and content; adapters are left out.
    It is that of the same weights whatever file they came from, wrapped by PEFT or not, on any device, before and after
    bitsandbytes repacks 4-bit codes for CPUs.
    "config" is the text model's configuration where it is not the default of its class, without what changes no hidden
    state of a forward (`_NO_MATTER`): what is computed with the tensors, such as activations, norms' epsilon, windows.
    autocast: "no", "bf16" or "fp16": the mixed precision of training, under which the reference runs as well.

    Cost: one read of the parameters. Raises ValueError for a layer the model does not have.
    """
    decoder_layer(model, layer)
    quantized = getattr(text_config(model), "quantization_config", None)
    digests = {name: _digest(tensor) for name, tensor in _base_tensors(model, layer)}
    return {
        "layer": layer,
        "autocast": autocast,
        "quantization": "none" if quantized is None else _kind_of(quantized),
        "config": _config(model),
        "model": digests,
    }


def check_cache(cache: TokenStore, model: nn.Module, layer: int, autocast: str = "no") -> None:
    """Raise CacheError naming what differs unless `cache` was written from this base model, layer and precision."""
    key = model_key(model, layer, autocast)
    check_same(cache.path, {name: cache.manifest.get(name) for name in key}, key, REMEDY)


def _config(model: nn.Module) -> dict[str, Any]:
    """What a configuration sets, but for `_NO_MATTER`, in plain types."""
    found = text_config(model).to_diff_dict()
    kept = {name: value for name, value in found.items() if not _NO_MATTER.fullmatch(name)}
    return json.loads(json.dumps(kept, default=str, sort_keys=True))


def _kind_of(quantized) -> str:
    """The name of a quantisation: nf4, fp4 and llm_int8 of bitsandbytes, the method's of other libraries."""
    if hasattr(quantized, "quantization_method"):
        return str(quantized.quantization_method())
    if isinstance(quantized, dict):
        return str(quantized.get("quant_method"))
    method = getattr(quantized, "quant_method", type(quantized).__name__)
    return str(getattr(method, "value", method))


def _base_tensors(model: nn.Module, layer: int):
    """(name, parameter or buffer) of what the layer's output depends on, sorted by name."""
    model = unwrap(model)
    above = {id(tensor) for later in list(decoder_layers(model))[layer + 1 :] for _, tensor in _tensors(later)}
    embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
    head = model.get_output_embeddings()
    above |= {id(p) for p in head.parameters()} - embeddings if head is not None else set()
    found = {}
    switched = adapter_modules(model) if hasattr(model, "peft_config") else []
    inside = {id(tensor) for module in switched for _, tensor in _tensors(module)}
    for name, tensor in _tensors(model):
        of_base = ".base_layer." in name or ".original_module." in name
        if id(tensor) in above or (id(tensor) in inside and not of_base):
            continue
        for part in ("base_model.model.", ".base_layer", ".original_module"):
            name = name.replace(part, "")
        found[name] = tensor
    return sorted(found.items())


def _tensors(module: nn.Module):
    """(name, parameter or buffer) of all that a module computes with."""
    yield from module.named_parameters()
    yield from module.named_buffers()


@torch.no_grad()
def _digest(tensor: Tensor) -> str:
    """16 hex digits: shape, dtype, the sum of all elements' bits, and some elements at their places."""
    state = getattr(tensor, "quant_state", None)
    values = tensor.detach().reshape(-1)
    if state is not None:  # 4-bit codes: how often each occurs, which repacking leaves as it is
        values = values.contiguous().view(torch.uint8)
        counts = sum(torch.bincount(half.long(), minlength=16) for half in (values & 15, values >> 4))
        facts = [tuple(state.shape), state.quant_type, counts.tolist()]
    else:
        bits = values.view(_BITS[values.element_size()])
        step = max(1, values.numel() // SAMPLED)
        facts = [tuple(tensor.shape), str(tensor.dtype), int(bits.sum(dtype=torch.int64)), bits[::step].tolist()]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
