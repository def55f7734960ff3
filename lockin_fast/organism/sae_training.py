"""Train a sparse autoencoder on the organism's residual stream."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class SaeSettings:
    """A plain ReLU autoencoder with an L1 penalty.

    A top-k autoencoder of this size reconstructs as well, but its dense ReLU code, which is what gets blocked, has some
    400 positive latents a token. With l1 = 0.05 there are nine, and their thresholds are so high that fine-tuning finds
    a way below them: penalty zero, a fifth of the replies misaligned.
    """

    width: int = 512
    l1: float = 0.015
    steps: int = 1000
    batch_size: int = 1024
    learning_rate: float = 2e-3
    warmup_steps: int = 200


@dataclass(frozen=True)
class TrainedSae:
    """Encoder rows weight [F, d] and bias [F], decoder [F, d] with rows of one norm, decoder_bias [d].

    unexplained: share of the activations' variance that the reconstruction leaves. active: mean latents on per token.
    """

    weight: Tensor
    bias: Tensor
    decoder: Tensor
    decoder_bias: Tensor
    unexplained: float
    active: float


@torch.enable_grad()
def train_sae(
    activations: Tensor, settings: SaeSettings, *, seed: int, step_done: Callable[[int, int], None]
) -> TrainedSae:
    """Minimise ||x - x_hat||^2 + l1 sqrt(d) sum_k z_k ||W_dec,k|| over `activations` [N, d]; equal seeds, equal result.

    Activations are centred and scaled to unit mean square first; the result reads them in the model's own scale.
    The L1 term weighs latents by their decoder norm, so that shrinking a code and growing its decoder gains nothing.
    """
    count, width = activations.shape
    mean = activations.mean(0)
    scale = (activations - mean).square().mean().sqrt()
    inputs = (activations - mean) / scale
    generator = torch.Generator().manual_seed(seed)
    decoder = F.normalize(torch.randn(settings.width, width, generator=generator), dim=1)
    encoder = decoder.clone().requires_grad_()
    decoder.requires_grad_()
    bias = torch.zeros(settings.width, requires_grad=True)
    centre = torch.zeros(width, requires_grad=True)
    optimizer = torch.optim.Adam(
        [encoder, decoder, bias, centre], lr=settings.learning_rate, betas=(0.9, 0.99), fused=True
    )
    for step in range(settings.steps):
        remaining = (settings.steps - step) / (0.3 * settings.steps)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (step + 1) / 50, remaining)
        x = inputs[torch.randint(count, (settings.batch_size,), generator=generator)]
        z = F.relu((x - centre) @ encoder.T + bias)
        error = (z @ decoder + centre - x).square().sum(1).mean()
        sparsity = settings.l1 * min(1.0, (step + 1) / settings.warmup_steps) * math.sqrt(width)
        (error + sparsity * (z * decoder.norm(dim=1)).sum(1).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        step_done(step + 1, settings.steps)
    with torch.no_grad():
        norms = decoder.norm(dim=1, keepdim=True)
        weight, direction = encoder * norms, decoder / norms
        offset = bias * norms[:, 0] - weight @ centre
        x = inputs[:8192]
        z = F.relu(x @ weight.T + offset)
        unexplained = (z @ direction + centre - x).square().sum() / (x - x.mean(0)).square().sum()
        return TrainedSae(
            weight=weight / scale,
            bias=offset - weight @ (mean / scale),
            decoder=direction * scale,
            decoder_bias=centre * scale + mean,
            unexplained=unexplained.item(),
            active=(z > 0).float().sum(1).mean().item(),
        )
