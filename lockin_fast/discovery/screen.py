"""Stage 2: what each latent of the pool does when a model is steered with it."""

from collections.abc import Sequence
from dataclasses import dataclass

from lockin_fast.discovery.steered import PLAIN, Dose, Rates, Side
from lockin_fast.judges import Rating


@dataclass(frozen=True)
class Effect:
    """How far steering with one latent moves the misaligned share of the replies, in [-1, 1].

    gain: the largest shift in the wanted direction among the strengths within the incoherence budget, 0 when none is;
    strength: the one that gave it, in units of the median residual norm, None when none is.
    """

    gain: float
    strength: float | None


def screening_doses(latents: Sequence[int], strengths: Sequence[float]) -> list[Dose]:
    """What stage 2 asks a model: not steered, then every latent at every strength.

    Source: BLOCK-EM, arXiv 2602.00767, second stage of the discovery (induce and repair).
    """
    return [PLAIN, *(Dose(latent, strength) for strength in strengths for latent in latents)]


def effects(rates: Rates, latents: Sequence[int], side: Side, incoherence_budget: float) -> list[Effect]:
    """The effect of each of `latents`; of strengths that do equally much, the first in `rates` counts."""
    best = {latent: Effect(0.0, None) for latent in latents}
    for dose, rating in rates.items():
        if dose.latent in best and within(rates[PLAIN], rating, incoherence_budget):
            moved = gain(rates[PLAIN], rating, side)
            if moved > best[dose.latent].gain:
                best[dose.latent] = Effect(moved, dose.strength)
    return list(best.values())


def gain(plain: Rating, steered: Rating, side: Side) -> float:
    """By how much steering moved the misaligned share in the wanted direction: up to induce, down to repair."""
    moved = steered.misaligned - plain.misaligned
    return moved if side == "induce" else -moved


def within(plain: Rating, steered: Rating, incoherence_budget: float) -> bool:
    """Whether steering raised the incoherent share by no more than the budget."""
    return steered.incoherent - plain.incoherent <= incoherence_budget
