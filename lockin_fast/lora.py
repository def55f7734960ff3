"""One LoRA adapter on a base model that is borrowed: added, trained, written, and taken off without a trace."""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lockin_fast.blocking.layers import decoder_layers


@dataclass(frozen=True)
class LoraSettings:
    """A LoRA adapter: rank r, scale alpha / r, on the modules with these names, in these decoder layers (None: all).

    use_rslora: scale alpha / sqrt(r) instead. use_dora: weight-decomposed, with a trained length of every output row.
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    layers: tuple[int, ...] | None = None
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self):
        for name, valid, expected in (
            ("r", self.r >= 1, "1 or more"),
            ("alpha", self.alpha > 0, "more than 0"),
            ("dropout", 0 <= self.dropout < 1, "at least 0 and below 1"),
            ("target_modules", len(self.target_modules) > 0, "at least one module name"),
            ("layers", self.layers is None or len(self.layers) > 0, "decoder layer indices, or none for all"),
        ):
            if not valid:
                raise ValueError(f"lora.{name}: got {getattr(self, name)!r}, expected {expected}")


def check_lora(model: nn.Module, lora: LoraSettings) -> None:
    """Raise ValueError unless the model is free of adapters and has the modules and layers that the settings name."""
    if hasattr(model, "peft_config"):
        raise ValueError("model: it has PEFT adapters already; pass the base model, after unload() or a merge")
    layers = decoder_layers(model)
    outside = [layer for layer in lora.layers or () if not 0 <= layer < len(layers)]
    if outside:
        raise ValueError(f"lora.layers: got {outside}, expected 0 to {len(layers) - 1}")
    weights = ((name, getattr(module, "weight", None)) for name, module in layers.named_modules())
    linear = {name.rpartition(".")[2] for name, weight in weights if weight is not None and weight.dim() == 2}
    unknown = [name for name in lora.target_modules if name not in linear]
    if unknown:
        raise ValueError(f"lora.target_modules: the model's layers have no {unknown}; they have {sorted(linear)}")


def adapted_modules(model: nn.Module, lora: LoraSettings) -> Iterator[tuple[str, nn.Module]]:
    """(name within its layer, module) of every module of the base model on which the settings put an adapter."""
    for index, layer in enumerate(decoder_layers(model)):
        if lora.layers is None or index in lora.layers:
            for name, module in layer.named_modules():
                if name.rpartition(".")[2] in lora.target_modules:
                    yield name, module


@contextmanager
def borrowed_with_lora(model: nn.Module, lora: LoraSettings, seed: int) -> Iterator[nn.Module]:
    """`model` with a fresh LoRA adapter (B = 0, A drawn by seed) inside the context, and as it was after it.

    After: same modules, weights, requires_grad, training modes, configuration and random state of torch, whatever
    happened inside.
    """
    from peft import LoraConfig, get_peft_model

    modes = [(module, module.training) for module in model.modules()]
    grads = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    use_cache = getattr(model.config, "use_cache", None)
    checkpointing = is_checkpointing(model)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        layers_to_transform=None if lora.layers is None else list(lora.layers),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT reads a model attribute that was renamed
            peft_model = get_peft_model(model, config)
        try:
            yield peft_model
        finally:
            peft_model.unload()
            if hasattr(model, "peft_config"):  # some versions of PEFT leave it behind
                del model.peft_config
            if is_checkpointing(model) and not checkpointing:
                stop_checkpointing(model)
            if use_cache is not None:
                model.config.use_cache = use_cache
            for parameter, requires_grad in grads:
                parameter.requires_grad_(requires_grad)
                parameter.grad = None
            for module, training in modes:
                module.training = training


def start_checkpointing(model: nn.Module) -> None:
    """Keep no activations inside the decoder layers in training mode, but compute them again in the backward."""
    for name in ("activation_checkpointing", "gradient_checkpointing"):  # the newer of two names, then the older
        if enable := getattr(model, f"{name}_enable", None):
            enable(**{f"{name}_kwargs": {"use_reentrant": False}})  # the other mode cuts hooks of older versions off
            return


def is_checkpointing(model: nn.Module) -> bool:
    """Whether the model computes activations again in the backward."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def stop_checkpointing(model: nn.Module) -> None:
    """Undo `start_checkpointing`, or what a trainer did to the same end."""
    # The newer of two names, beside which transformers 6 knows no other, and 5.0 only the older.
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    disable()
    model.disable_input_require_grads()  # which came with it
    vars(model).pop("_require_grads_hooks", None)


@contextmanager
def adapter(model: nn.Module, folder: Path | None) -> Iterator[nn.Module]:
    """The model with the PEFT adapter of `folder` on it (None: as it is); the base model is as it was afterwards."""
    if folder is None:
        yield model
        return
    from peft import PeftModel

    modes = [(module, module.training) for module in model.modules()]
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    adapted = PeftModel.from_pretrained(model, folder)
    try:
        yield adapted
    finally:
        adapted.unload()
        vars(model).pop("peft_config", None)
        for module, training in modes:
            module.training = training
        for parameter, value in requires_grad:
            parameter.requires_grad_(value)


def save_adapter(peft_model: nn.Module, folder: str | os.PathLike) -> None:
    """Write the adapter as PEFT does, with its lists sorted: PEFT writes sets in an order that changes by process.

    Raises FloatingPointError for adapter weights that are not finite, OSError where they cannot be written.
    """
    from safetensors import SafetensorError

    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise FloatingPointError(f"adapter weight {name} is not finite; lower the learning rate or lambda")
    try:
        peft_model.save_pretrained(folder, save_embedding_layers=False)  # else PEFT looks for the base model's files
    except SafetensorError as error:  # how a full disk shows
        raise OSError(f"output: the adapter could not be written to {folder}: {error}") from error
    path = Path(folder) / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("target_modules", "modules_to_save"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
