"""What the noise of a cached reference costs: a penalty that is there although nothing has moved."""

from dataclasses import dataclass

from torch import Tensor

MAX_SPURIOUS_LOSS = 0.01  # above this a penalty against the cache is refused; a language model's loss is about 1
MARGIN_SIGMAS = 4.0


@dataclass(frozen=True)
class NoiseFloor:
    """The same tokens' latents as they are (a row alone in its batch) and as the cache has them: both fp32 [n, K].

    They differ by what another batching does to the rounding of the forward pass, and by what storing in four bits
    does. Latents of a GPU in bf16 are marginal; four bits are far from exact.
    """

    exact: Tensor
    stored: Tensor

    @property
    def share(self) -> Tensor:
        """p_k: the share of tokens on which the latent is active, in one of the two: fp64 [K]."""
        return self._active.double().mean(0)

    @property
    def sigma(self) -> Tensor:
        """sigma_k: root mean square of the error over the tokens on which the latent is active: fp64 [K]."""
        squares = self._error.double().square().sum(0)
        return (squares / self._active.sum(0).clamp(min=1)).sqrt()

    @property
    def margin(self) -> Tensor:
        """Four sigma_k, fp32 [K]: growth that the penalty then leaves free, so that noise is hardly penalised."""
        return (MARGIN_SIGMAS * self.sigma).float()

    def spurious_loss(self, margin: Tensor | None = None) -> float:
        """Expected loss at lambda = 1 of a model that has not changed, a penalised token, summed over latents.

        sum over k of p_k sigma_k^2 / 2: noise is as often in the penalised direction as in the other. With a margin
        [K], the mean of relu(|error| - margin)^2 over the sample in the place of p_k sigma_k^2.
        """
        error = self._error.double().abs()
        if margin is not None:
            error = (error - margin.double()).clamp(min=0)
        return float(error.square().mean(0).sum() / 2)

    @property
    def _error(self) -> Tensor:
        return self.stored - self.exact

    @property
    def _active(self) -> Tensor:
        return (self.stored > 0) | (self.exact > 0)


def check_noise(floor: NoiseFloor, scale: float, margin: Tensor | None) -> None:
    """Raise ValueError where scale * spurious_loss exceeds MAX_SPURIOUS_LOSS; scale is lambda, times what it is per."""
    loss = scale * floor.spurious_loss(margin)
    if loss <= MAX_SPURIOUS_LOSS:
        return
    largest = float(floor.sigma.max())
    if margin is None:
        hint = 'use margin="noise" (growth below four sigma is then free), '
    else:
        hint = "use a larger margin, "
    raise ValueError(
        f"reference: the noise of the cache alone would cost a loss of {loss:.2g} at this lambda, more than "
        f"{MAX_SPURIOUS_LOSS} (sigma of a latent up to {largest:.2g}, {len(floor.exact)} tokens measured); {hint}a "
        "smaller lambda, a cache of latents instead of hidden states in four bits, or the live reference"
    )
