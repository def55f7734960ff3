"""Reference latents: what is written of a hidden state, and what a penalty reads back."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockin_fast.cache.files import CacheError
from lockin_fast.cache.manifest import REMEDY, check_same
from lockin_fast.cache.noise import NoiseFloor
from lockin_fast.cache.store import Reference, TokenStore
from lockin_fast.sae import SparseAutoencoder


@dataclass(frozen=True)
class LatentContent:
    """A pool of latents, z = relu(h W^T + b) in fp32, before any gate: 4 P bytes a token.

    A gate needs no cache of its own: z above the threshold is what the gated latent is.
    """

    sae: SparseAutoencoder  # the rows of the pool, in its order
    kind = "latents"

    def key(self, dtype: torch.dtype) -> dict[str, Any]:
        latents = self.sae.latents.tolist()
        return {"latents": latents, "sae": dict(zip(map(str, latents), row_digests(self.sae, dtype), strict=True))}

    def settled(self, sample: Tensor) -> tuple["LatentContent", dict[str, Any]]:
        """This, and nothing to note: no choice is left to a sample of hidden states."""
        return self, {}

    def encode(self, h: Tensor) -> dict[str, Tensor]:
        """What is stored of hidden states [n, d]: z [n, P]."""
        return {"z": self.sae.to(h.device, h.dtype).encode_latents(h).cpu()}

    def noise(self, alone: Tensor, batched: Tensor) -> dict[str, Tensor]:
        """What is kept of a sample of tokens that ran in two batchings."""
        return {"exact": self.encode(alone)["z"], "stored": self.encode(batched)["z"]}

    def bytes_per_token(self) -> int:
        return 4 * len(self.sae.latents)


class LatentCache(TokenStore):
    """A cache of reference latents, opened by `open_cache`: fp32 z of a pool of latents for every token."""

    @property
    def latents(self) -> list[int]:
        """The pool: any of these latents can be blocked."""
        return self.manifest["latents"]

    def reference(self, sae: SparseAutoencoder, *, threshold: Tensor | None = None) -> "LatentReference":
        """The reference for the latents of `sae`, in its order. Raises CacheError for one that is not in the pool."""
        wanted = (torch.arange(sae.width) if sae.latents is None else sae.latents).tolist()
        column = {latent: i for i, latent in enumerate(self.latents)}
        missing = [latent for latent in wanted if latent not in column]
        if missing:
            raise CacheError(
                f"cache: {self.path} holds {len(column)} latents, not latent {missing[0]}; add its set to cache.latents"
                " and write the cache in a new folder"
            )
        digests = dict(zip(map(str, wanted), row_digests(sae, self.dtype), strict=True))
        check_same(self.path, {"sae": {name: self.manifest["sae"][name] for name in digests}}, {"sae": digests}, REMEDY)
        columns = torch.tensor([column[latent] for latent in wanted])
        return LatentReference(self, columns, None if threshold is None else threshold.cpu().float())


@dataclass(frozen=True)
class LatentReference(Reference):
    """K of a cache's latents, gated as the penalty wants them."""

    store: LatentCache
    columns: Tensor  # int64 [K]
    threshold: Tensor | None  # fp32 [K]

    def take(self, place: np.ndarray) -> dict[str, Tensor]:
        return {"z": self._gated(self.store.gather("z", place, self.columns))}

    def arguments(self, taken: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `block_penalty` takes them: z_ref [B, S, K]."""
        return {"z_ref": taken["z"]}

    def noise(self) -> NoiseFloor:
        exact, stored = (self._gated(self.store.noise[name][:, self.columns]) for name in ("exact", "stored"))
        return NoiseFloor(exact, stored)

    def _gated(self, z: Tensor) -> Tensor:
        return z if self.threshold is None else z.where(z > self.threshold, 0.0)


def row_digests(sae: SparseAutoencoder, dtype: torch.dtype) -> Sequence[str]:
    """One digest a latent of its encoder row as a product in `dtype` reads it, its bias and the norm of a token."""
    weight = sae.weight.detach().cpu().to(dtype).float()
    rows = torch.cat([weight, sae.bias.detach().cpu().float()[:, None]], dim=1).numpy()
    return [hashlib.sha256(sae.normalization.encode() + row.tobytes()).hexdigest()[:16] for row in rows]
