"""What the trainer mix-in asks of everything that is added to the loss."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from lockin_fast.blocking.layers import Captured, Site, unwrap
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


class Sums(NamedTuple):
    """All terms of one forward: `means` in their order, differentiable; the rest is for the log and is detached."""

    means: list[Tensor]  # a term's sum over tokens, multiplied by the scale
    values: dict[str, Tensor]  # {column: the means of its terms, added}
    active: Tensor | int
    pairs: Tensor | int


def measure_terms(
    terms: Sequence[LossTerm], hidden: Sequence[Tensor], h_refs: Sequence, labels: Tensor | None, kwargs: dict,
    scale: Tensor | float,
) -> Sums:  # fmt: skip
    """Measure every term on its hidden state against its reference; kwargs are those the model was called with."""
    sums, device = Sums([], {}, 0, 0), hidden[0].device  # layers of one model may lie on several
    for term, h, h_ref in zip(terms, hidden, h_refs, strict=True):
        found = term.measure(h, h_ref, labels, kwargs)
        measured = Measured(*(value.to(device) if isinstance(value, Tensor) else value for value in found))
        mean = measured.total * scale
        sums.means.append(mean)
        sums.values[term.column] = sums.values.get(term.column, 0.0) + mean.detach()
        sums = sums._replace(active=sums.active + measured.active, pairs=sums.pairs + measured.pairs)
    return sums


def checked_terms(penalty: LossTerm | Sequence[LossTerm] | None) -> tuple[LossTerm, ...]:
    """The loss terms as a tuple, empty for None.

    Raises TypeError for what is no loss term, ValueError where terms that share a column of the log differ in weight.
    """
    if penalty is None:
        return ()
    terms = tuple(penalty) if isinstance(penalty, (list, tuple)) else (penalty,)
    weights = {}
    for term in terms:
        if not isinstance(term, LossTerm):
            raise TypeError(f"penalty: got {type(term).__name__}, expected a BlockPenalty, a KLPenalty or several")
        if weights.setdefault(term.column, term.weight) != term.weight:
            raise ValueError(
                f"penalty: the terms that log {term.column} have the weights {weights[term.column]:g} and "
                f"{term.weight:g}; give them one lambda"
            )
    return terms


def checked_hidden(seen: Captured, module: nn.Module, term: LossTerm, model: nn.Module) -> Tensor:
    """What the forward showed at the term's site. Raises RuntimeError where it showed nothing, or takes no gradient."""
    hidden = seen.hidden.get(module)
    where = term.site if isinstance(term.site, str) else f"layer {term.site}"
    if hidden is None or seen.kwargs is None:
        raise RuntimeError(
            f"{where} of {type(unwrap(model)).__name__} was not seen in the forward: another model ran, or a graph "
            "that was compiled before the penalty was there (call torch._dynamo.reset() first)"
        )
    if term.weight and not hidden.requires_grad:
        raise RuntimeError(
            f"the output of {where} takes no gradient, so the penalty could change nothing: no parameter at or below "
            "that layer is trained, or reentrant activation checkpointing cuts it off (pass "
            'gradient_checkpointing_kwargs={"use_reentrant": False})'
        )
    return hidden
