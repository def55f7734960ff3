"""What the trainer mix-in asks of everything that is added to the loss."""

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from lockin_fast.blocking.layers import Site
from lockin_fast.cache import TokenStore


class Measured(NamedTuple):
    """One micro-batch of a loss term: `total` is the fp32 sum over tokens, without the weight, differentiable."""

    total: Tensor
    active: Tensor | int = 0  # pairs of token and latent that cost something
    pairs: Tensor | int = 0  # pairs that could


@runtime_checkable
class LossTerm(Protocol):
    """weight * total / (the trainer's own count of tokens), of the hidden state at one site and a reference's there."""

    column: str  # the mean over tokens in the log, without the weight
    weight_column: str  # the weight in the log
    weight: float  # 0 measures the term and trains without it
    site: Site  # whose hidden state it is about
    reference: str | nn.Module | TokenStore  # "live": the model itself, adapters off; a frozen second model; a cache

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError unless the term fits the model."""

    def measure(self, h: Tensor, h_ref: Tensor | dict, labels: Tensor | None, kwargs: dict) -> Measured:
        """The term for h and h_ref [B, S, d] at its site; kwargs are those the model was called with.

        A term whose reference is a cache also has `cached`, what it reads of it, and `tokens`, which of a batch's; its
        h_ref is what `cached.take` found.
        """
