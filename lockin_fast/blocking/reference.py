"""The live reference: the base model's hidden states for the batch at hand, at the cost of the layers they need."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lockin_fast.blocking.layers import Site, is_compiled, is_sharded, residual_stream, site_module, text_config, unwrap
from lockin_fast.cache import TokenStore
from lockin_fast.quantized import is_quantized

_LOSS_ARGUMENTS = ("labels", "shift_labels", "num_items_in_batch", "fused_lm_head")  # the last is TRL's


class _Reached(Exception):
    """The last site has run; nothing after it is wanted."""


def adapter_modules(model: nn.Module) -> list[nn.Module]:
    """PEFT's switchable modules of the model (adapter layers, and copies of modules to save).

    Raises ValueError when there are none: with no adapters to switch off, the base model is not in there any more.
    """
    # A property on PEFT's modules; transformers' models have a method of that name.
    modules = [m for m in model.modules() if isinstance(getattr(type(m), "disable_adapters", None), property)]
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


class Reference:
    """The model that a penalty is anchored to, set up once and asked for every micro-batch.

    model: the model in training, whose adapters are switched off for the while (adapters=True), or a frozen second one.
    sites: where its hidden states are wanted: 0-based indices of decoder layers, or FINAL.

    PEFT's own `disable_adapter()` walks every module and sets requires_grad of every adapter weight, on the way back to
    True whatever it was; here only the switch itself is flipped, on modules found once.
    """

    def __init__(self, model: nn.Module, *sites: Site, adapters: bool):
        self._model = unwrap(model)
        self._sites = {site: site_module(model, site) for site in sites}
        self._adapters = adapter_modules(self._model) if adapters else []
        # A quantised layer drops nothing, and multiplies otherwise in eval mode than in training on some devices, where
        # the reference would no longer be the model in training without its adapters.
        self._modules = [module for module in self._model.modules() if not is_quantized(module)]
        self._unlike_compiled = is_compiled(model)
        # FSDP's collectives must not be cut short.
        self._runs_on = is_sharded(self._model)
        self._overrides = {"use_cache": False} if hasattr(text_config(model), "use_cache") else {}

    def hidden_state(self, args: tuple, kwargs: dict) -> Tensor:
        """`hidden_states` of the one site."""
        (hidden,) = self.hidden_states(args, kwargs).values()
        return hidden

    def hidden_states(self, args: tuple, kwargs: dict) -> dict[Site, Tensor]:
        """Hidden state [B, S, d] of the reference at every site: no gradient, no dropout, no loss.

        args, kwargs: what the model in training was called with: same batch, same attention mask, same positions, so
        that adapters that change nothing give exactly the training forward's hidden state. One forward serves all sites
        and stops right after the last. Modes and adapters are put back as they were found, whatever happens.
        """
        kwargs = {key: value for key, value in kwargs.items() if key not in _LOSS_ARGUMENTS} | self._overrides
        found: dict[Site, Tensor] = {}

        def see(site, output):
            found[site] = residual_stream(output)
            if len(found) == len(self._sites) and not self._runs_on:
                raise _Reached

        handles = [
            module.register_forward_hook(lambda module, inputs, output, site=site: see(site, output))
            for site, module in self._sites.items()
        ]
        try:
            with torch.no_grad(), self._as_base_model():
                self._model(*args, **kwargs)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if self._unlike_compiled and _rounds_to_16_bits(next(iter(found.values()))):
            self._unlike_compiled = False  # said once
            warnings.warn(
                "reference: the model in training is compiled and rounds its 16-bit values in other places than the "
                "reference, which is not. The block penalty of a fresh adapter's first step would be 0; what it is, "
                "times lambda, is spurious loss: give BlockPenalty a margin, or train without torch.compile",
                stacklevel=2,
            )
        return found

    @contextmanager
    def _as_base_model(self) -> Iterator[None]:
        training = [module for module in self._modules if module.training]
        enabled = [module for module in self._adapters if not module.disable_adapters]
        try:
            for module in training:
                module.training = False
            for module in enabled:
                module._disable_adapters = True
            yield
        finally:
            for module in enabled:
                module._disable_adapters = False
            for module in training:
                module.training = True


def references_of(model: nn.Module, terms: Iterable) -> dict[str | nn.Module, Reference]:
    """{source: Reference} of the loss terms that run a model, "live" or a second one; one serves all of its sites."""
    sites: dict[str | nn.Module, list[Site]] = {}
    for term in terms:
        if not isinstance(term.reference, TokenStore):
            sites.setdefault(term.reference, []).append(term.site)
    return {
        source: Reference(model if source == "live" else source, *of_source, adapters=source == "live")
        for source, of_source in sites.items()
    }


def _rounds_to_16_bits(hidden: Tensor) -> bool:
    return hidden.element_size() == 2 or torch.is_autocast_enabled(hidden.device.type)
