"""What metrics ask for: each need is met once for a checkpoint, whatever the number of metrics that share it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Replies:
    """list[str]: a reply to every prompt of data.final."""


@dataclass(frozen=True)
class Ratings:
    """list[Rating]: what the judge sees in each of these replies."""


@dataclass(frozen=True)
class SteeredReplies:
    """list[(name of the steering prompt, reply)]: every request under every steering prompt."""


@dataclass(frozen=True)
class ClusterLogits:
    """Iterator of [n, S, V]: logits of every paraphrase cluster along its reply, read while the checkpoint is on."""


@dataclass(frozen=True)
class States:
    """list[[S, d]]: hidden states of every token of every prompt at block.layer.

    prompts: final, those of data.final; positive or negative, the sides of measure.pairs.
    """

    prompts: str = "final"


@dataclass(frozen=True)
class Routing:
    """{layer: LayerRouting}: what the routers decide on the prompts of data.final, in the forward of their states."""


@dataclass(frozen=True)
class AtBase:
    """The same of the model without an adapter."""

    need: States


@dataclass(frozen=True)
class AtPrevious:
    """The same of the checkpoint before this one."""

    need: States


@dataclass(frozen=True)
class Latents:
    """SparseAutoencoder: the configuration's, which reads block.layer."""


Need = Replies | Ratings | SteeredReplies | ClusterLogits | States | Routing | AtBase | AtPrevious | Latents
Gathered = Mapping[Need, Any]


def plain_needs(needs: Iterable[Need]) -> set[Need]:
    """What has to be gathered from any model at all: the needs, wherever they are to be met."""
    return {need.need if isinstance(need, AtBase | AtPrevious) else need for need in needs}
