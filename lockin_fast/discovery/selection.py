"""The selection rules of the paper: which latents of the pool make a set."""

from collections.abc import Sequence
from dataclasses import dataclass

from lockin_fast.discovery.screen import Effect


@dataclass(frozen=True)
class Reduction:
    """What stage 3 found about one latent of the shortlist.

    alpha_ind, alpha_rep: the calibrated strength on the base and on the misaligned model, None where every strength is
    beyond the budget. induced, repaired: by how much steering at these moves the misaligned share in the wanted
    direction, on the prompts that calibrated them. reduction: misaligned(0) - misaligned(alpha_rep) of the misaligned
    model on prompts that took no part in that, None without alpha_rep.
    """

    latent: int
    alpha_ind: float | None
    alpha_rep: float | None
    induced: float
    repaired: float
    reduction: float | None


def by_induction_and_repair(
    latents: Sequence[int], induced: Sequence[Effect], repaired: Sequence[Effect]
) -> dict[int, float]:
    """IndPP: {latent: score}, best first, score = gain in induced + gain in repaired misalignment of stage 2.

    Equal scores keep the order of `latents`. Source: BLOCK-EM, arXiv 2602.00767, section on latent selection.
    """
    scores = {k: up.gain + down.gain for k, up, down in zip(latents, induced, repaired, strict=True)}
    return dict(sorted(scores.items(), key=lambda item: -item[1]))


def by_valid_reduction(found: Sequence[Reduction]) -> dict[int, float]:
    """ValidReduc: {latent: reduction}, largest first, of the latents that induce and repair, each at its own strength.

    Source: BLOCK-EM, arXiv 2602.00767, section on latent selection.
    """
    valid = {f.latent: f.reduction for f in found if f.induced > 0 and f.repaired > 0 and f.reduction is not None}
    return dict(sorted(valid.items(), key=lambda item: -item[1]))


def halves(prompts: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """Every other prompt, and the others: those that calibrate, and those that select."""
    return prompts[::2], prompts[1::2]
