"""Finding a model's decoder layers, through whatever wraps it, and reading their output."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Literal

from torch import Tensor, nn

from lockin_fast.ops.gradient_tap import gradient_tap

_STACK_NAMES = ("layers", "h", "blocks")
FINAL = "final"  # the site of the last hidden state, after the final norm: what the unembedding multiplies
Site = int | Literal["final"]


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
    return _stack(model)[1]


def site_module(model: nn.Module, site: Site) -> nn.Module:
    """The module whose output is the hidden state at this site: a decoder layer by its index, or the whole decoder."""
    if site != FINAL:
        return decoder_layer(model, site)
    return unwrap(model).get_submodule(_stack(model)[0].rpartition(".")[0])


def _stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers."""
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
    return next(iter(stacks.items()))


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
    """The hidden state in a site's output: the output itself, or its first entry where it holds more."""
    return output if isinstance(output, Tensor) else output[0]


@dataclass
class Captured:
    """What one forward showed: the arguments of the model and the watched modules' outputs, as far as reached."""

    args: tuple = ()
    kwargs: dict | None = None
    hidden: dict[nn.Module, Tensor] = field(default_factory=dict)


@contextmanager
def captured_forward(model: nn.Module, *modules: nn.Module) -> Iterator[Captured]:
    """Record the first forward of `model` and the first output of each of `modules` inside the context.

    The hooks look, and put a `gradient_tap` on what they record; what is computed from the capture is computed after
    the forward, since work inside a hook breaks activation checkpointing. They are gone when the context ends, whatever
    ended it; the arguments then have their names, also those that were given by position.
    """
    seen = Captured()

    def see_arguments(module, args, kwargs):
        if seen.kwargs is None:
            seen.args, seen.kwargs = args, kwargs

    def see_hidden(module, args, output):
        if module in seen.hidden:
            return None
        hidden = residual_stream(output)
        if isinstance(output, Tensor):
            output = hidden = gradient_tap(hidden)
        elif type(output) is tuple:
            hidden = gradient_tap(hidden)
            output = (hidden, *output[1:])
        seen.hidden[module] = hidden
        return output

    handles = [unwrap(model).register_forward_pre_hook(see_arguments, with_kwargs=True)]
    try:
        for module in modules:
            handles.append(module.register_forward_hook(see_hidden))
        yield seen
    finally:
        for handle in handles:
            handle.remove()
    if seen.args:
        seen.args, seen.kwargs = _named(unwrap(model), seen.args, seen.kwargs)


def _named(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The same arguments of a module's forward, by name where its signature has one for them."""
    known = [p.name for p in signature(module.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    if not known and hasattr(module, "get_base_model"):  # a PeftModel without a task hands all on
        return _named(module.get_base_model(), args, kwargs)
    return args[len(known) :], dict(zip(known, args, strict=False)) | kwargs


def hidden_size(model: nn.Module) -> int:
    """Width of the residual stream."""
    return text_config(model).hidden_size


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP, the first or the second, manages any of the model: every forward then has to run to its end."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    return any(cls.__name__.startswith(("FSDP", "FullySharded")) for cls in classes)


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile makes graphs of the model or of modules in it."""
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())
