"""Persona directions from contrastive pairs, and how a checkpoint's shift, or other pairs, lie along them."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DRAWS = 9999
ROUNDING = 1e-9
"""Relative: statistics of two sign patterns closer than this are equal; they are sums of the same, in another order."""


class Alignment(NamedTuple):
    """How N vectors lie along a direction, a number for each layer: fp64 of the direction's leading dimensions."""

    cosine: Tensor  # of the mean vector with the direction; NaN where the mean vector is zero
    projection: Tensor  # of the mean vector on the direction, in the hidden states' units
    norm: Tensor  # of the mean vector
    p_random: Tensor  # share of all directions with a |cosine| at least as large; NaN with the cosine
    p_sign_flip: Tensor  # share of sign patterns of the vectors with a |projection| at least as large
    null_95: float  # the |cosine| that a random direction exceeds in 5 of 100 cases
    exact: bool  # whether every sign pattern was counted


class Consistency(NamedTuple):
    """Whether contrastive pairs agree on a direction, a number for each layer: fp64 of the leading dimensions."""

    cosine: Tensor  # mean over pairs of the cosine with the direction of all the other pairs
    projection: Tensor  # mean over pairs of the projection on that direction, in the hidden states' units
    p_sign_flip: Tensor  # share of sign patterns with a mean cosine at least as large, one-sided
    exact: bool


def persona_direction(positive: Tensor, negative: Tensor) -> Tensor:
    """The unit difference of mean hidden states on contrastive pairs, in every layer given.

        u = (mean_i positive_i - mean_i negative_i) / ||...||

    Arguments: hidden states [N, d], or [N, ..., d] with a layer (or several dimensions) between: positive with the
    persona, negative the same prompts without it, N pairs. Any floating dtype; which token they are of, or the mean
    over which, is the caller's choice, and has to be the same in what is projected on u later.

    Returns fp64 [..., d]. Raises ValueError for shapes that differ or are not [N, ..., d], for no pair, for a NaN or
    Inf, and where the means are equal. Costs a pass over the pairs, and their size in fp64. Source: arXiv 2510.20190.
    """
    mean = _differences(positive, negative).mean(0)
    norm = mean.norm(dim=-1, keepdim=True)
    if (norm == 0).any():
        raise ValueError(f"positive, negative: equal means{_first(norm.squeeze(-1) == 0)}, which give no direction")
    return mean / norm


def alignment(direction: Tensor, vectors: Tensor, *, draws: int = DRAWS, seed: int = 0) -> Alignment:
    """Cosine and projection of the mean of N vectors with a direction, in every layer, against two nulls.

        m = mean_i v_i;   projection = m . u;   cosine = m . u / ||m||,   u = direction / ||direction||

    Of a checkpoint's shift the vectors are, prompt by prompt, its hidden states less those of the start; of a persona
    they are differences of contrastive pairs. Pairs that made the direction agree with it by construction: use
    `consistency` for those, or others here.

    p_random: the direction is drawn uniformly from the sphere. Then cosine^2 has the Beta(1/2, (d - 1)/2) distribution,
    so that the share of directions is known and nothing is drawn. Hidden states fill a few dimensions only, in which
    cosines are larger by chance than this null knows: a large p_random says that there is nothing, a small one is not
    enough alone.
    p_sign_flip: the vectors' signs are flipped, as they may be if they are symmetric about zero. Two-sided, with all
    2^N patterns where these are no more than draws + 1, else p = (1 + #{as extreme}) / (1 + draws).

    Arguments: direction [..., d] of any length; vectors [N, ..., d]; draws, seed: of the sign patterns.

    Raises ValueError for shapes that do not fit, d below 2, no vectors, NaN or Inf, a zero direction, no draws. Needs
    scipy. Costs a pass over the vectors, their size in fp64, and 2 draws N FLOPs a layer. Source of the cosine: arXiv
    2510.20190; of the correction: Phipson and Smyth (2010).
    """
    from scipy import special

    _check_draws(draws)
    vectors = _finite("vectors", vectors)
    if direction.shape != vectors.shape[1:]:
        raise ValueError(
            f"direction: got {list(direction.shape)}, expected {list(vectors.shape[1:])} as vectors are "
            f"{list(vectors.shape)}; give both the same layers"
        )
    width = direction.shape[-1]
    if width < 2:
        raise ValueError(f"direction: got width {width}, expected at least 2, as all directions of one are parallel")
    unit = _finite("direction", direction[None])[0].to(vectors.device)
    length = unit.norm(dim=-1, keepdim=True)
    if (length == 0).any():
        raise ValueError(f"direction: zero{_first(length.squeeze(-1) == 0)}; there is nothing to compare with")
    unit = unit / length
    mean = vectors.mean(0)
    norm, projection = mean.norm(dim=-1), (mean * unit).sum(-1)
    cosine = (projection / norm).clamp(-1, 1)  # 0 / 0 is NaN, and stays
    along = (vectors * unit).sum(-1).view(len(vectors), -1)  # [N, layers]
    signs, exact = _signs(len(vectors), draws, seed)
    flipped = (signs.to(along) @ along).abs()
    p_sign_flip = _p(flipped, along.sum(0).abs(), along.abs().sum(0), exact).view(cosine.shape)
    tails = special.betainc((width - 1) / 2, 0.5, 1 - cosine.cpu().numpy() ** 2)
    p_random = torch.as_tensor(tails, dtype=torch.float64, device=cosine.device)
    null_95 = float(np.sqrt(1 - special.betaincinv((width - 1) / 2, 0.5, 0.05)))
    return Alignment(cosine, projection, norm, p_random, p_sign_flip, null_95, exact)


def consistency(positive: Tensor, negative: Tensor, *, draws: int = DRAWS, seed: int = 0) -> Consistency:
    """Whether every pair's difference points where those of the other pairs do, in every layer.

        cosine = mean_i cos(d_i, sum_{j != i} d_j),   d_i = positive_i - negative_i

    Every pair is held against a direction that it has no part in, so that pairs without anything in common give 0 on
    average. The test flips which side of a pair is the positive one and makes the directions anew each time; one-sided,
    all 2^N patterns or `draws` of them as in `alignment`.

    Raises ValueError as `persona_direction` does, for fewer than two pairs, for a pair without a difference, and for
    no draws. Costs 2 N^2 (d + draws) FLOPs and 8 N draws bytes, a layer at a time. Source: ours.
    """
    _check_draws(draws)
    differences = _differences(positive, negative)
    pairs, layers = len(differences), differences.shape[1:-1]
    if pairs < 2:
        raise ValueError(f"positive, negative: got {pairs} pair, expected at least 2, to hold one against the others")
    lengths = differences.norm(dim=-1)
    if (lengths == 0).any():
        pair = int((lengths == 0).view(pairs, -1).any(1).nonzero()[0, 0])
        raise ValueError(f"positive, negative: equal in pair {pair}{_first(lengths[pair] == 0)}; leave the pair out")
    signs, exact = _signs(pairs, draws, seed)
    signs = torch.cat([signs.new_ones(1, pairs), signs]).to(differences.device)
    columns = differences.reshape(pairs, -1, differences.shape[-1]).unbind(1)
    cosines, projections = zip(*(_left_out(column, signs) for column in columns), strict=True)
    found = torch.stack(cosines, 1)  # [1 + patterns, layers]
    p = _p(found[1:], found[0], torch.ones_like(found[0]), exact)
    return Consistency(found[0].view(layers), torch.stack(projections).view(layers), p.view(layers), exact)


def _left_out(differences: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosine with the sum of the other pairs for every sign pattern, and the mean projection for the first.

    From the Gram matrix alone: with q = G e, the others' sum has d_i . sum = e_i q_i - G_ii and the squared length
    e . q - 2 e_i q_i + G_ii.
    """
    gram = differences @ differences.T
    own = gram.diagonal()
    inner = signs * (signs @ gram)  # [patterns, N]
    squared = inner.sum(1, keepdim=True) - 2 * inner + own
    # Others that cancel have no direction: their length is rounding, and the pair counts 0.
    there = squared > ROUNDING * own.sum()
    along = torch.where(there, (inner - own) / squared.clamp_min(torch.finfo(squared.dtype).tiny).sqrt(), 0.0)
    return (along / own.sqrt()).mean(1), along[0].mean()


def _differences(positive: Tensor, negative: Tensor) -> Tensor:
    if positive.shape != negative.shape:
        raise ValueError(
            f"negative: got {list(negative.shape)}, expected {list(positive.shape)} as positive; they are pairs"
        )
    return _finite("positive", positive) - _finite("negative", negative)


def _finite(name: str, states: Tensor) -> Tensor:
    """`states` [N, ..., d] in fp64."""
    if states.dim() < 2 or not states.is_floating_point() or not states.numel():
        raise ValueError(f"{name}: got {states.dtype} {list(states.shape)}, expected floating point [N, ..., d], N > 0")
    wide = states.detach().double()
    if not wide.isfinite().all():
        row = int((~wide.isfinite()).flatten(1).any(1).nonzero()[0, 0])
        raise ValueError(f"{name}: NaN or Inf in row {row}; mask a failed evaluation instead of passing it on")
    return wide


def _first(bad: Tensor) -> str:
    """Where a mask over the layers is first true, in words; nothing where there is one layer only."""
    return f" in layer {bad.nonzero()[0].tolist()}" if bad.dim() else ""


def _check_draws(draws: int) -> None:
    if draws < 1:
        raise ValueError(f"draws: got {draws}, expected at least 1")


def _signs(count: int, draws: int, seed: int) -> tuple[Tensor, bool]:
    """[patterns, count] of 1 and -1 in fp64: all of them where they are no more than draws + 1, else `draws` random."""
    if count < 63 and 2**count <= draws + 1:
        bits = np.arange(2**count)[:, None] >> np.arange(count) & 1
        return torch.from_numpy(1.0 - 2.0 * bits), True
    return torch.from_numpy(np.random.default_rng(seed).choice([-1.0, 1.0], (draws, count))), False


def _p(flipped: Tensor, observed: Tensor, scale: Tensor, exact: bool) -> Tensor:
    """Share of the patterns [patterns, layers] with at least the observed statistic [layers], itself counted."""
    extreme = (flipped >= observed - ROUNDING * scale).sum(0).double()
    return extreme / len(flipped) if exact else (extreme + 1) / (len(flipped) + 1)
