"""The live reference: the base model's hidden state for the batch at hand, at the cost of the layers it needs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lockin_fast.blocking.layers import decoder_layer, is_sharded, residual_stream, text_config, unwrap

_LOSS_ARGUMENTS = ("labels", "shift_labels", "num_items_in_batch")


class _Reached(Exception):
    """The blocked layer has run; nothing after it is wanted."""


def adapter_modules(model: nn.Module) -> list[nn.Module]:
    """PEFT's switchable modules of the model (adapter layers, and copies of modules to save).

    Raises ValueError when there are none: with no adapters to switch off, the base model is not in there any more.
    """
    modules = [module for module in model.modules() if hasattr(type(module), "disable_adapters")]
    if not modules:
        raise ValueError(
            f'reference: "live" switches PEFT adapters off, but {type(model).__name__} has none (full fine-tuning, or '
            "prompt tuning); pass a frozen copy of the base model as reference="
        )
    return modules


def check_live_reference(model: nn.Module) -> None:
    """Raise ValueError unless switching the adapters off gives the frozen base model back."""
    inside = {id(p) for module in adapter_modules(model) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        frozen_by_peft = ".base_layer." in name or ".original_module." in name
        if parameter.requires_grad and (frozen_by_peft or id(parameter) not in inside):
            raise ValueError(
                f'reference: "live" needs a base model that does not change, but its parameter {name} is trained; '
                "freeze it, or pass a frozen copy of the base model as reference="
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout; every module is put back in the mode it was found in."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before its adapters; every one is put back as it was found.

    PEFT's own `disable_adapter()` also sets requires_grad of every adapter weight, on the way back to True whatever it
    was; here only the switch itself is flipped, module by module.
    """
    enabled = [module for module in adapter_modules(model) if not module.disable_adapters]
    try:
        for module in enabled:
            module._disable_adapters = True
        yield
    finally:
        for module in enabled:
            module._disable_adapters = False


def hidden_state(model: nn.Module, layer: nn.Module, args: tuple, kwargs: dict) -> Tensor:
    """Output of `layer` in a forward of `model` on these arguments, stopped there; no gradient, no loss, no cache.

    Under FSDP the forward runs to its end, since its collectives must not be cut short.
    """
    kwargs = {key: value for key, value in kwargs.items() if key not in _LOSS_ARGUMENTS}
    if hasattr(text_config(model), "use_cache"):
        kwargs["use_cache"] = False
    found = []
    runs_on = is_sharded(model)

    def stop(module, inputs, output):
        found.append(residual_stream(output))
        if not runs_on:
            raise _Reached

    handle = layer.register_forward_hook(stop)
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


def reference_hidden_state(reference, model: nn.Module, layer: int, args: tuple, kwargs: dict) -> Tensor:
    """Hidden state [B, S, d] of the reference at the output of decoder layer `layer`.

    reference: "live", `model` with its adapters off, or a frozen second model. args, kwargs: what `model` was called
    with in training: same batch, same attention mask, same positions, so that adapters that change nothing give
    exactly the training forward's hidden state.
    """
    model = unwrap(model)
    if reference == "live":
        with evaluating(model), adapters_off(model):
            return hidden_state(model, decoder_layer(model, layer), args, kwargs)
    with evaluating(reference):
        return hidden_state(reference, decoder_layer(reference, layer), args, kwargs)
