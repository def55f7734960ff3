"""Finding a model's decoder layers, through whatever wraps it, and reading their output."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

_STACK_NAMES = ("layers", "h", "blocks")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile; its PEFT wrapper, which routes inputs, stays on."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def text_config(model: nn.Module):
    """The configuration of the language model, also inside PEFT and multimodal wrappers."""
    config = getattr(unwrap(model), "config", None)
    if config is None:
        raise ValueError(f"model: {type(model).__name__} has no config; expected a Hugging Face causal language model")
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers: the one stack named as such that is as long as the configuration says.

    Covers Llama, Qwen, Mistral and Gemma (`model.layers`) and GPT-2 (`transformer.h`), wrapped or not.
    Raises ValueError when there is none, or more than one.
    """
    count = text_config(model).num_hidden_layers
    stacks = {
        name: module
        for name, module in unwrap(model).named_modules()
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in _STACK_NAMES and len(module) == count
    }
    if len(stacks) != 1:
        found = ", ".join(stacks) or "none"
        raise ValueError(
            f"model: expected one list of {count} decoder layers in {type(model).__name__} named "
            f"{', '.join(_STACK_NAMES)}; found {found}"
        )
    return next(iter(stacks.values()))


def decoder_layer(model: nn.Module, layer: int) -> nn.Module:
    """The decoder layer with this 0-based index. Raises ValueError when out of range."""
    layers = decoder_layers(model)
    if not 0 <= layer < len(layers):
        raise ValueError(
            f"layer: got {layer}, expected 0 to {len(layers) - 1}: the model has {len(layers)} decoder layers, "
            "counted from 0 (layer L of a paper that counts hidden states is index L - 1)"
        )
    return layers[layer]


def residual_stream(output) -> Tensor:
    """A decoder layer's hidden state: its output, or the first entry where it returns a tuple."""
    return output[0] if isinstance(output, tuple) else output


@dataclass
class Captured:
    """What one forward showed: the arguments of the model and the blocked layer's output, or None if never reached."""

    args: tuple = ()
    kwargs: dict | None = None
    hidden: Tensor | None = None


@contextmanager
def captured_forward(model: nn.Module, layer: nn.Module) -> Iterator[Captured]:
    """Record the first forward of `model` and the first output of `layer` inside the context.

    The hooks only look; what is computed from the capture is computed after the forward, since work inside a hook
    breaks activation checkpointing. They are gone when the context ends, whatever ended it.
    """
    seen = Captured()

    def see_arguments(module, args, kwargs):
        if seen.kwargs is None:
            seen.args, seen.kwargs = args, kwargs

    def see_hidden(module, args, output):
        if seen.hidden is None:
            seen.hidden = residual_stream(output)

    handles = [
        unwrap(model).register_forward_pre_hook(see_arguments, with_kwargs=True),
        layer.register_forward_hook(see_hidden),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def hidden_size(model: nn.Module) -> int:
    """Width of the residual stream."""
    return text_config(model).hidden_size


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP manages the model: its collectives have to run to the end of every forward."""
    return any(cls.__name__.startswith("FSDP") for cls in type(model).__mro__)

