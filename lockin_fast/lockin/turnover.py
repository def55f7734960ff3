"""How many of one SAE's latents change between two states of a model, on each token and over all of them."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lockin_fast.ops.encode_latents import encode_latents
from lockin_fast.ops.encode_topk import encode_topk
from lockin_fast.sae import SparseAutoencoder

TILE_ELEMENTS = 2**22  # of the activations held at a time: 16 MB in fp32 for each of the two streams
TILE_TOKENS = 1024
RATE = 1e-3
"""A latent that fires on one token in a thousand is alive."""


@dataclass(frozen=True)
class Turnover:
    """Sums over tokens from which turnover, births and deaths follow. Those of different batches merge by `+`.

    A token on which neither stream has a latent on has no turnover (0/0); such tokens are left out and counted.
    """

    before: Tensor  # [F] int64, tokens with the latent on
    after: Tensor  # [F] int64, the same of the second stream
    token_turnover: Tensor  # fp64 scalar, sum over tokens of 1 - |both on| / |either on|
    tokens: Tensor  # int64 scalar
    silent: Tensor  # int64 scalar, tokens left out

    @property
    def by_token(self) -> float:
        """Mean over tokens of 1 - Jaccard of the latents on before and after, in [0, 1]; NaN where all are silent."""
        return (self.token_turnover / (self.tokens - self.silent)).item()

    def pooled(self, rate: float = RATE) -> float:
        """1 - Jaccard of the latents alive before and after, in [0, 1]; NaN where none is alive in either.

        Alive are those on in at least the share `rate` of the tokens. Equals (births + deaths) / (alive in either).
        """
        before, after = self._alive(rate)
        return 1.0 - ((before & after).sum().double() / (before | after).sum()).item()

    def births(self, rate: float = RATE) -> Tensor:
        """Rows of the SAE's latents that are alive after and were not before, [n] int64."""
        before, after = self._alive(rate)
        return (after & ~before).nonzero().squeeze(1)

    def deaths(self, rate: float = RATE) -> Tensor:
        """Rows of the SAE's latents that were alive before and are not after, [n] int64."""
        before, after = self._alive(rate)
        return (before & ~after).nonzero().squeeze(1)

    def _alive(self, rate: float) -> tuple[Tensor, Tensor]:
        if not 0 < rate <= 1:
            raise ValueError(f"rate: got {rate}, expected a share of the tokens above 0 and up to 1")
        return self.before.double() / self.tokens >= rate, self.after.double() / self.tokens >= rate

    def __add__(self, other):
        if not isinstance(other, Turnover):
            return NotImplemented
        if self.before.shape != other.before.shape:
            raise ValueError(
                f"Turnover: cannot merge {len(self.before)} latents with {len(other.before)}; merge what is of one SAE"
            )
        return Turnover(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __radd__(self, other):
        return self if isinstance(other, int) and other == 0 else NotImplemented


@torch.no_grad()
def latent_turnover(sae: SparseAutoencoder, before: Tensor, after: Tensor, *, mask: Tensor | None = None) -> Turnover:
    """Which latents of one fixed SAE are on for the same tokens before and after, summed up; never [T, F].

        turnover(t) = 1 - |A_t and B_t| / |A_t or B_t|,   A_t, B_t: latents with z > 0 before and after

    with z as `sae.encode` gives it, thresholds and top-k included.

    Arguments: before, after: hidden states [..., d] of the same tokens, of the SAE's width, float32, float16 or
    bfloat16, where the SAE reads; mask: bool [...], the tokens that count, None for all.

    Raises ValueError for shapes or dtypes that differ, no token, NaN or Inf in a counted token, and for a top-k or
    groupmax SAE that is read in part. Costs 4 T d F FLOPs, scratch memory of two tiles of 16 MB, and 32 bytes for each
    token. Source: ours.
    """
    first, second = _tokens(sae, before, after, mask)
    on = _chosen(sae, first, second) if sae.activation == "topk" else _blocks(sae, first, second)
    counts = first.new_zeros((2, len(sae.weight)), dtype=torch.int64)
    both, either = first.new_zeros((2, len(first)), dtype=torch.int64)
    for tokens, latents, count, shared, union in on:
        counts[:, latents] += count
        both[tokens] += shared
        either[tokens] += union
    turnover = torch.where(either > 0, 1 - both.double() / either.clamp_min(1), 0.0)
    return Turnover(*counts, turnover.sum(), torch.tensor(len(first), device=first.device), (either == 0).sum())


Found = tuple[slice, slice, Tensor, Tensor, Tensor]
"""Tokens, latents, and of those: counts [2, latents], latents on in both streams [tokens], in either [tokens]."""


def _blocks(sae: SparseAutoencoder, first: Tensor, second: Tensor) -> Iterator[Found]:
    """Tile by tile, all tokens of some latents after another, so that rows are cast once."""
    # A latent of a groupmax is on where it is the largest of its group: groups stay whole.
    group = sae.width // sae.k if sae.activation == "groupmax" else 1
    size = max(TILE_ELEMENTS // TILE_TOKENS // group, 1) * group
    for start in range(0, len(sae.weight), size):
        latents = slice(start, min(start + size, len(sae.weight)))
        rows, bias = sae.weight[latents].to(first.dtype), sae.bias[latents]
        threshold = None if sae.threshold is None else sae.threshold[latents]
        for t in range(0, len(first), TILE_TOKENS):
            tokens = slice(t, t + TILE_TOKENS)
            streams = []
            for stream in (first, second):
                z = encode_latents(sae.normalize(stream[tokens]), rows, bias, threshold=threshold)
                if group > 1:
                    z = z.unflatten(1, (-1, group))
                    largest = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, z.argmax(-1, keepdim=True), True)
                    z = z.masked_fill_(~largest, 0.0).flatten(1)
                streams.append(z > 0)
            a, b = streams
            yield tokens, latents, torch.stack([a.sum(0), b.sum(0)]), (a & b).sum(1), (a | b).sum(1)


def _chosen(sae: SparseAutoencoder, first: Tensor, second: Tensor) -> Iterator[Found]:
    """Some tokens after others, the k largest latents of each over the full width."""
    width, k = len(sae.weight), sae.k
    size = max(TILE_ELEMENTS // k**2, 1)
    for t in range(0, len(first), size):
        tokens = slice(t, t + size)
        streams = [encode_topk(sae.normalize(stream[tokens]), sae.weight, sae.bias, k) for stream in (first, second)]
        on = [found.values > 0 for found in streams]
        count = first.new_zeros((2, width), dtype=torch.int64)
        for row, found, there in zip(count, streams, on, strict=True):
            row.index_add_(0, found.indices.flatten(), there.flatten().long())
        same = streams[0].indices[:, :, None] == streams[1].indices[:, None]
        both = (same & on[0][:, :, None] & on[1][:, None]).sum((1, 2))
        yield tokens, slice(0, width), count, both, on[0].sum(1) + on[1].sum(1) - both


def _tokens(sae: SparseAutoencoder, before: Tensor, after: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The counted tokens of both streams, [T, d] each, checked."""
    if before.dim() < 1 or before.shape[-1] != sae.d_model:
        raise ValueError(
            f"before: got {list(before.shape)}, expected [..., {sae.d_model}], the width of the SAE; give the hidden "
            "states of the layer that it reads"
        )
    if before.shape != after.shape or before.dtype != after.dtype:
        raise ValueError(
            f"after: got {after.dtype} {list(after.shape)}, expected {before.dtype} {list(before.shape)} as before; "
            "run both on the same tokens"
        )
    in_order = sae.latents is None or torch.equal(sae.latents, torch.arange(sae.width, device=sae.latents.device))
    if sae.activation in ("topk", "groupmax") and (sae.k is None or not in_order):
        raise ValueError(
            f"sae: a {sae.activation} with k={sae.k} of which {len(sae.weight)} of {sae.width} latents were read; k "
            "and all latents in order are needed to know which are on"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != before.shape[:-1]):
        raise ValueError(f"mask: got {mask.dtype} {list(mask.shape)}, expected bool {list(before.shape[:-1])}")
    streams = []
    for name, stream in (("before", before), ("after", after)):
        counted = stream.reshape(-1, sae.d_model) if mask is None else stream[mask]
        if not counted.isfinite().all():
            raise ValueError(f"{name}: NaN or Inf in a token that counts; mask a failed evaluation")
        streams.append(counted)
    if not len(streams[0]):
        raise ValueError("before: no token counts; give at least one")
    return streams[0], streams[1]
