"""Stage 3: how strongly a latent may steer before the model stops making sense."""

from collections.abc import Callable, Sequence

from lockin_fast.discovery.screen import within
from lockin_fast.discovery.steered import PLAIN, Dose, Rates
from lockin_fast.judges import Rating

Measure = Callable[[Sequence[Dose]], Rates]
Calibrated = tuple[dict[int, float | None], Rates]
"""The strength of each latent, None where even the smallest is beyond the budget; and all that was measured."""


def calibrate_by_grid(
    measure: Measure, latents: Sequence[int], strengths: Sequence[float], budget: float
) -> Calibrated:
    """The largest of `strengths` (ascending) at which each latent keeps within the incoherence budget.

    `measure` is asked for every latent at every strength, and not steered: len(latents) * len(strengths) + 1 doses.
    Source: BLOCK-EM, arXiv 2602.00767, third stage of the discovery.
    """
    rates = measure([PLAIN, *(Dose(latent, strength) for strength in strengths for latent in latents)])
    fitting = {
        latent: [s for s in strengths if within(rates[PLAIN], rates[Dose(latent, s)], budget)] for latent in latents
    }
    return {latent: max(found, default=None) for latent, found in fitting.items()}, rates


def calibrate_by_bisection(
    measure: Measure, latents: Sequence[int], strengths: Sequence[float], budget: float
) -> Calibrated:
    """One of `strengths` (ascending) within the budget whose next larger one is beyond it, for each latent.

    Where incoherence only rises with strength, that is what the grid finds. The middle strengths of all latents are
    measured together: ceil(log2(len(strengths) + 1)) rounds of at most len(latents) doses.
    """
    rates: dict[Dose, Rating] = {}
    bounds = {latent: (-1, len(strengths)) for latent in latents}  # the first is within the budget, the second beyond
    while open_ := {latent: sum(bound) // 2 for latent, bound in bounds.items() if bound[1] - bound[0] > 1}:
        rates |= measure([PLAIN, *(Dose(latent, strengths[middle]) for latent, middle in open_.items())])
        for latent, middle in open_.items():
            fits = within(rates[PLAIN], rates[Dose(latent, strengths[middle])], budget)
            bounds[latent] = (middle, bounds[latent][1]) if fits else (bounds[latent][0], middle)
    return {latent: strengths[low] if low >= 0 else None for latent, (low, _) in bounds.items()}, rates


METHODS = {"grid": calibrate_by_grid, "bisection": calibrate_by_bisection}
