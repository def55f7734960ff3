"""The two models of a patching sweep, held as one: a base model, and the same with its adapters on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import nn

from lockin_fast.blocking.layers import decoder_layers, unwrap
from lockin_fast.blocking.reference import adapter_modules

Side = Literal["base", "misaligned"]


class Sides:
    """A PEFT model whose adapters are switched in all of it, or below and above a layer apart.

    Raises ValueError for a model without switchable adapters, or with adapters merged into the weights.
    """

    def __init__(self, model: nn.Module):
        model = unwrap(model)
        modules = adapter_modules(model)
        if any(getattr(module, "merged", False) for module in modules):
            raise ValueError("model: its adapters are merged into the weights; unmerge them, so that they can be off")
        layers = decoder_layers(model)
        place = {id(child): number for number, layer in enumerate(layers) for child in layer.modules()}
        below = {id(child) for child in model.get_input_embeddings().modules()}
        self._place = [(-1 if id(m) in below else place.get(id(m), len(layers)), m) for m in modules]

    @contextmanager
    def as_model(self, lower: Side, upper: Side | None = None, through: int = -1) -> Iterator[None]:
        """Inside, the embeddings and the layers up to and with `through` are those of `lower`, the rest of `upper`.

        Without `upper` the model is `lower` in all its parts. The switches are as they were afterwards.
        """
        upper = upper or lower
        before = [module._disable_adapters for _, module in self._place]
        try:
            for number, module in self._place:
                module._disable_adapters = (lower if number <= through else upper) == "base"
            yield
        finally:
            for (_, module), disabled in zip(self._place, before, strict=True):
                module._disable_adapters = disabled
