"""What the routing of each layer amounts to: figures, the metrics of a checkpoint, and warnings."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lockin_fast.ops.routing_stats import RoutingStats

LEAST_EXPECTED = 20
"""Assignments an expert would get under equal load, below which a tenth of that is too often chance to warn of."""


@dataclass(frozen=True)
class LayerRouting:
    """The routing of one layer. Those of different batches merge by `+` (and `sum(...)`).

    E experts, of which each token is sent to top_k. With raw router logits x, the routing probabilities are
    p = softmax(x) over all experts for "softmax" routers, also where the router itself takes the softmax over the
    chosen ones only (gpt-oss), and p = sigmoid(x) / sum sigmoid(x) for "sigmoid" routers. `stats` holds the sums over
    tokens, its counts those of the experts that the router chose, with its groups and correction bias where it has any.
    """

    router: Literal["softmax", "sigmoid"]
    top_k: int
    stats: RoutingStats
    squared_normaliser: Tensor  # fp64 scalar, sum over tokens of (ln sum exp x)^2; NaN for sigmoid routers

    @property
    def experts(self) -> int:
        return len(self.stats.counts)

    @property
    def max_load(self) -> Tensor:
        """The largest share of one expert in the assignments, from 1/E to 1/top_k; fp64."""
        return self.stats.load.max()

    @property
    def balance_loss(self) -> Tensor:
        """E sum_e load_e mean p_e: 1 where either is equal over the experts, E/top_k at most; fp64.

        Times top_k it is the load-balancing loss of transformers, of the sum of all layers where it pools them. Source:
        Switch Transformer, arXiv 2101.03961; with normalised sigmoids DeepSeek-V3, arXiv 2412.19437.
        """
        return self.experts * (self.stats.load * self.stats.probability / self.stats.tokens).sum()

    @property
    def z_loss(self) -> float | None:
        """Mean over tokens of (ln sum exp x)^2, which keeps logits small; None for sigmoid routers, which have no sum.

        Source: ST-MoE, arXiv 2202.08906.
        """
        return None if self.router == "sigmoid" else (self.squared_normaliser / self.stats.tokens).item()

    def __add__(self, other):
        if not isinstance(other, LayerRouting):
            return NotImplemented
        if (self.router, self.top_k) != (other.router, other.top_k):
            raise ValueError(
                f"LayerRouting: cannot merge a {self.router} router of top {self.top_k} with a {other.router} router "
                f"of top {other.top_k}; merge what is of one kind"
            )
        squares = self.squared_normaliser + other.squared_normaliser
        return LayerRouting(self.router, self.top_k, self.stats + other.stats, squares)

    def __radd__(self, other):
        return self if isinstance(other, int) and other == 0 else NotImplemented


@dataclass(frozen=True)
class RoutingWarning:
    """collapsed: all tokens go to the same few experts. under-used: some get next to none. too few tokens to say."""

    layer: int
    kind: Literal["collapsed", "under-used", "too few tokens"]
    experts: tuple[int, ...]  # the few that get all, or those that get next to none
    why: str


def routing_metrics(layers: Mapping[int, LayerRouting]) -> dict[str, float]:
    """The metrics of a checkpoint: the means over layers of entropy and information, the largest load in any layer.

    routing_entropy: H(p) / ln E of a token, in [0, 1]. routing_information: I(E;X) = H(mean p) - mean H(p) in nats,
    in [0, ln E]. routing_max_load: the share of the busiest expert of any layer. Source: arXiv 2510.20190.
    Raises ValueError without layers.
    """
    _check(layers)
    found = list(layers.values())
    return {
        "routing_entropy": math.fsum(float(layer.stats.entropy) for layer in found) / len(found),
        "routing_information": math.fsum(float(layer.stats.mutual_information) for layer in found) / len(found),
        "routing_max_load": max(float(layer.max_load) for layer in found),
    }


def routing_rows(layers: Mapping[int, LayerRouting]) -> list[dict[str, Any]]:
    """A row for each layer, for JSON: its router, all figures, and the load of every expert.

    class_mutual_information is None where no classes were given. Information is in nats.
    """
    _check(layers)
    return [
        {
            "layer": number,
            "router": layer.router,
            "experts": layer.experts,
            "top_k": layer.top_k,
            "tokens": int(layer.stats.tokens),
            "entropy": float(layer.stats.entropy),
            "mutual_information": float(layer.stats.mutual_information),
            "class_mutual_information": (
                float(layer.stats.class_mutual_information) if layer.stats.class_counts.any() else None
            ),
            "max_load": float(layer.max_load),
            "balance_loss": float(layer.balance_loss),
            "z_loss": layer.z_loss,
            "load": layer.stats.load.tolist(),
        }
        for number, layer in layers.items()
    ]


def routing_warnings(
    layers: Mapping[int, LayerRouting], *, collapse: float = 0.9, underused: float = 0.1
) -> list[RoutingWarning]:
    """Layers whose tokens all go the same way, and experts that get next to nothing.

    collapsed: the top_k busiest experts take at least `collapse` of what they could take beyond an equal load,
        (share - top_k/E) / (1 - top_k/E) >= collapse.
    under-used: experts with a load below `underused` times the equal one, 1/E.
    too few tokens: an equal load would give an expert fewer than 20 assignments, so that neither can be told.

    A layer that sends every token to all its experts has nothing to choose, and no warning. Source: ours.
    Raises ValueError without layers, and for fractions outside (0, 1].
    """
    _check(layers)
    for name, value in (("collapse", collapse), ("underused", underused)):
        if not 0 < value <= 1:
            raise ValueError(f"{name}: got {value}, expected a fraction above 0 and up to 1")
    found = []
    for number, layer in layers.items():
        load, fair = layer.stats.load, layer.top_k / layer.experts
        if fair == 1:
            continue
        expected = int(layer.stats.tokens) * fair
        if expected < LEAST_EXPECTED:
            why = f"{expected:.3g} assignments an expert under equal load; {LEAST_EXPECTED} are needed to judge"
            found.append(RoutingWarning(number, "too few tokens", (), why))
            continue
        busiest = load.topk(layer.top_k)
        share = float(busiest.values.sum())
        if (share - fair) / (1 - fair) >= collapse:
            experts = tuple(sorted(busiest.indices.tolist()))
            why = f"{share:.1%} of the assignments go to {layer.top_k} of {layer.experts} experts"
            found.append(RoutingWarning(number, "collapsed", experts, why))
        idle = tuple(torch.nonzero(load < underused / layer.experts).flatten().tolist())
        if idle:
            why = f"{len(idle)} of {layer.experts} experts get less than {underused:g} of an equal load"
            found.append(RoutingWarning(number, "under-used", idle, why))
    return found


def _check(layers: Mapping[int, LayerRouting]) -> None:
    if not layers:
        raise ValueError("layers: nothing was read; run a forward of the model inside `RoutingReader.reading`")
