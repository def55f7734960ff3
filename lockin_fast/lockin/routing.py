"""Reading a mixture-of-experts model's routers: sums over tokens of what every one of them decides, by layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lockin_fast.blocking.layers import decoder_layers, text_config
from lockin_fast.lockin.routing_figures import LayerRouting
from lockin_fast.ops.routing_stats import RoutingStats, routing_stats

KINDS = {
    "softmax": (
        "Mixtral", "Qwen2Moe", "Qwen3Moe", "Qwen3Next", "Qwen3_5Moe", "Qwen3VLMoeText", "Olmoe", "FlexOlmo", "GptOss",
    ),
    "sigmoid": ("DeepseekV3", "DeepseekV32", "Glm4Moe", "Glm4MoeLite", "Glm4vMoeText", "GlmMoeDsa", "Dots1"),
}  # fmt: skip
"""Families whose router modules return (raw logits, weights, indices), by what makes probabilities of the logits."""
# Some are spelled TopkRouter.
RULES = {f"{family}TopKRouter".lower(): rule for rule, families in KINDS.items() for family in families}
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")  # in configurations
PROBABLE = 1e-2  # a sum of probabilities in bf16 is this close to 1


class RoutingReader:
    """Sums up the routing of a model's forwards, layer by layer, without keeping logits.

        reader = RoutingReader(model)
        for batch in batches:
            with torch.no_grad(), reader.reading(batch["attention_mask"].bool()):
                model(**batch)
        metrics, warnings = routing_metrics(reader.layers), routing_warnings(reader.layers)

    Arguments: model, a Hugging Face causal language model, wrapped or not; num_classes, that of the input classes given
    to `reading`, 0 for none. `layers` maps the index of a decoder layer to its `LayerRouting`; dense layers between
    have none.

    Raises ValueError for a dense model and for a mixture of experts whose routers are of no known kind: another
    router's numbers would mean something else. Costs, in a forward, one read of each layer's logits.
    """

    def __init__(self, model: nn.Module, *, num_classes: int = 0):
        if num_classes < 0:
            raise ValueError(f"num_classes: got {num_classes}, expected 0 or more")
        self.num_classes = num_classes
        self.layers: dict[int, LayerRouting] = {}
        self._routers = _routers(model)

    @contextmanager
    def reading(self, mask: Tensor, classes: Tensor | None = None) -> Iterator[None]:
        """Adds the one forward that runs inside to the sums; of one that fails nothing is added.

        mask: bool [B, S], the tokens that count; padding does not. classes: int64 [B], of the rows, or [B, S], of the
        tokens, -1 for none; needed where the reader has num_classes.

        Raises ValueError for a wrong mask or class, or one of other tokens than the forward's; RuntimeError where a
        layer's router did not run exactly once, or does not return raw logits.
        """
        classes = self._checked(mask, classes)
        found: dict[int, LayerRouting] = {}
        handles = [
            router.register_forward_hook(partial(self._read, found, layer, rule, mask.flatten(), classes))
            for layer, router, rule in self._routers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        missing = sorted({layer for layer, *_ in self._routers} - found.keys())
        if missing:
            raise RuntimeError(
                f"the routers of layers {missing} did not run: no forward ran inside, or a fused kernel or a compiled "
                "graph stands in for them; run the model's own modules"
            )
        # Only now: layers that disagree about a batch must not come into being.
        self.layers = {layer: self.layers.get(layer, 0) + found[layer] for layer in sorted(found)}

    def _checked(self, mask: Tensor, classes: Tensor | None) -> Tensor | None:
        """The classes of all tokens, [B S]."""
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2 or not mask.any():
            what = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"mask: got {what}, expected bool [B, S] with a token that counts")
        if (classes is not None) != (self.num_classes > 0):
            got = "none" if classes is None else "some"
            raise ValueError(f"classes: got {got}, expected classes of {self.num_classes} kinds, as num_classes says")
        if classes is None:
            return None
        if classes.shape not in (mask.shape, mask.shape[:1]):
            raise ValueError(
                f"classes: got {list(classes.shape)}, expected {list(mask.shape[:1])} or {list(mask.shape)} as mask"
            )
        whole = classes[:, None].expand_as(mask) if classes.dim() == 1 else classes
        if classes.dtype != torch.int64 or not ((whole >= -1) & (whole < self.num_classes)).all():
            raise ValueError(f"classes: expected int64 from -1 to {self.num_classes - 1}, got {classes.dtype} beyond")
        return whole.flatten()

    @torch.no_grad()
    def _read(
        self, found: dict[int, LayerRouting], layer: int, rule: str, mask: Tensor, classes: Tensor | None,
        module: nn.Module, args: Any, output: Any,
    ) -> None:  # fmt: skip
        if layer in found:
            raise RuntimeError(f"layer {layer}: its router ran twice; put one forward into `reading` at a time")
        logits, chosen = _logits(module, layer, output)
        if len(logits) != len(mask):
            raise ValueError(
                f"mask: {len(mask)} tokens, but the router of layer {layer} saw {len(logits)}; give the mask of "
                "the forward inside, and nothing but that forward"
            )
        mask, classes = mask.to(logits.device), None if classes is None else classes.to(logits.device)
        stats = routing_stats(logits, mask=mask, router=rule)
        counts = _counts(chosen, mask, classes, self.num_classes, logits.shape[1])
        squares = logits.float().logsumexp(1).double().square()
        squares = squares[mask].sum() if rule == "softmax" else squares.new_tensor(torch.nan)
        stats = RoutingStats(stats.probability, stats.entropy_sum, counts.sum(0), counts[:-1], stats.tokens)
        found[layer] = LayerRouting(rule, chosen.shape[1], stats, squares)


def _routers(model: nn.Module) -> list[tuple[int, nn.Module, str]]:
    """(layer, module, rule) of every router. A layer may hold several, as a trained copy beside the original."""
    found, unknown = [], []
    for layer, decoder in enumerate(decoder_layers(model)):
        for module in decoder.modules():
            # A parametrized module is of a class made on the spot, below its own.
            names = [cls.__name__ for cls in type(module).__mro__]
            rule = next((RULES[name.lower()] for name in names if name.lower() in RULES), None)
            if rule:
                found.append((layer, module, rule))
            elif names[0].endswith("Router"):
                unknown.append(names[0])
    known = ", ".join(family for families in KINDS.values() for family in families)
    config = text_config(model)
    experts = max((getattr(config, name, None) or 0 for name in EXPERT_COUNTS), default=0)
    if unknown or (not found and experts > 1):
        what = f"a router of class {unknown[0]}" if unknown else f"{experts} experts, but no router module"
        raise ValueError(
            f"model: {type(model).__name__} has {what}; which probabilities it means is known of these families only: "
            f"{known}"
        )
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} is dense: it has no router in any of its {len(decoder_layers(model))} "
            "layers; leave the routing metrics out"
        )
    return found


def _logits(module: nn.Module, layer: int, output: Any) -> tuple[Tensor, Tensor]:
    """Raw logits [T, E] and chosen experts [T, k] of a router's output."""
    name = type(module).__name__
    if not isinstance(output, tuple) or len(output) != 3:
        raise RuntimeError(
            f"layer {layer}: {name} returned {type(output).__name__}, expected (logits, weights, indices); this "
            "version of transformers has other routers, update it"
        )
    logits, _, chosen = output
    if logits.shape[-1] > 1 and bool((logits >= 0).all() & ((logits.float().sum(-1) - 1).abs() < PROBABLE).all()):
        raise RuntimeError(
            f"layer {layer}: {name} returned probabilities as its logits, of which the normaliser is lost; update "
            "transformers"
        )
    return logits.reshape(-1, logits.shape[-1]), chosen.reshape(-1, chosen.shape[-1])


def _counts(chosen: Tensor, mask: Tensor, classes: Tensor | None, num_classes: int, experts: int) -> Tensor:
    """Assignments [C + 1, E] int64 by class, the last row those of no class."""
    table = torch.zeros((num_classes + 1, experts), dtype=torch.int64, device=chosen.device)
    label = torch.full_like(mask, num_classes, dtype=torch.int64)
    if classes is not None:
        label = torch.where(classes >= 0, classes, label)
    cells = label[:, None] * experts + chosen
    table.view(-1).index_add_(0, cells.flatten(), mask.long()[:, None].expand_as(cells).flatten())
    return table
