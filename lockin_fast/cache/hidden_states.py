"""Reference hidden states in four bits: what is written, and what a penalty, discovery or patching reads back."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockin_fast.cache.keys import token_keys
from lockin_fast.cache.noise import NoiseFloor
from lockin_fast.cache.store import Reference, TokenStore
from lockin_fast.ops.nf4 import BLOCKSIZES
from lockin_fast.ops.nf4_tensor import NF4Tensor, outlier_channels, quantize_nf4
from lockin_fast.sae import SparseAutoencoder


@dataclass(frozen=True)
class HiddenStateContent:
    """Hidden states in NF4 beside `outliers` channels as they are: d/2 + 4 d/blocksize + 2 outliers bytes a token."""

    width: int
    outliers: int = 8
    blocksize: int = 64
    channels: Tensor | None = None  # int32 [outliers], chosen from a sample
    kind = "hidden_states"

    def __post_init__(self):
        if self.blocksize not in BLOCKSIZES or self.width % self.blocksize:
            fitting = [size for size in BLOCKSIZES if self.width % size == 0]
            raise ValueError(f"blocksize: got {self.blocksize} for a width of {self.width}, expected one of {fitting}")
        if not 0 <= self.outliers < self.width:
            raise ValueError(f"outliers: got {self.outliers}, expected 0 to {self.width - 1} channels")

    def key(self, dtype: torch.dtype) -> dict[str, Any]:
        return {"width": self.width, "outliers": self.outliers, "blocksize": self.blocksize}

    def settled(self, sample: Tensor) -> tuple["HiddenStateContent", dict[str, Any]]:
        """This with the outlier channels of a sample of hidden states [n, d], and a note of them."""
        channels = outlier_channels(sample, self.outliers).cpu()
        return self.with_channels(channels.tolist()), {"channels": channels.tolist()}

    def with_channels(self, channels: list[int]) -> "HiddenStateContent":
        return replace(self, channels=torch.tensor(channels, dtype=torch.int32))

    def encode(self, h: Tensor) -> dict[str, Tensor]:
        """What is stored of hidden states [n, d]: codes, absmax, and the elements of outlier channels."""
        packed = self._quantized(h)
        stored = {"codes": packed.codes, "absmax": packed.absmax}
        if packed.outliers is not None:
            stored["outliers"] = packed.outliers
        return {name: tensor.cpu() for name, tensor in stored.items()}

    def noise(self, alone: Tensor, batched: Tensor) -> dict[str, Tensor]:
        """What is kept of a sample of tokens that ran in two batchings: whole, for the noise of any latent."""
        return {"exact": alone.cpu(), "stored": self._quantized(batched).dequantize().cpu()}

    def bytes_per_token(self) -> int:
        return self.width // 2 + 4 * self.width // self.blocksize + 4 * self.outliers

    def _quantized(self, h: Tensor) -> NF4Tensor:
        return quantize_nf4(h.contiguous(), blocksize=self.blocksize, outliers=self.channels.to(h.device))


class HiddenStateCache(TokenStore):
    """A cache of hidden states in NF4, opened by `open_cache`. As a reference it serves every latent of every SAE."""

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> NF4Tensor:
        """The hidden states of tokens [B, S] as an NF4Tensor [B, S, d], zeros where attention_mask leaves tokens out.

        For discovery, patching and the choice of latents, which then need no forward pass through the base model.
        Raises CacheError for a token that is not cached.
        """
        from lockin_fast.cache.collate import looked_up

        wanted = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        taken = looked_up(self._everything(), token_keys(input_ids, attention_mask), wanted, input_ids)
        return self.packed(taken)

    def packed(self, taken: dict[str, Tensor]) -> NF4Tensor:
        """NF4Tensor [..., d] of stored tensors [..., n]."""
        leading, width = taken["codes"].shape[:-1], self.manifest["width"]
        flat = {name: tensor.flatten(0, -2) for name, tensor in taken.items()}
        channels = torch.tensor(self.manifest["channels"], dtype=torch.int32, device=taken["codes"].device)
        return NF4Tensor(
            flat["codes"], flat["absmax"], channels if "outliers" in flat else None, flat.get("outliers"),
            torch.Size((*leading, width)), self.dtype, self.manifest["blocksize"],
        )  # fmt: skip

    def reference(self, sae: SparseAutoencoder, *, threshold: Tensor | None = None) -> "HiddenStateReference":
        """The reference for the latents of `sae`, gated by `threshold` [K] where given."""
        return HiddenStateReference(self, sae, threshold)

    def _everything(self) -> "HiddenStateReference":
        return HiddenStateReference(self, None, None)


@dataclass(frozen=True)
class HiddenStateReference(Reference):
    """A cache's hidden states, as the latents of an SAE read them."""

    store: HiddenStateCache
    sae: SparseAutoencoder | None
    threshold: Tensor | None

    def take(self, place: np.ndarray) -> dict[str, Tensor]:
        names = ("codes", "absmax", "outliers") if self.store.manifest["channels"] else ("codes", "absmax")
        return {name: self.store.gather(name, place) for name in names}

    def arguments(self, taken: dict[str, Tensor]) -> dict[str, NF4Tensor]:
        """As `block_penalty` takes them: h_ref, an NF4Tensor [B, S, d]."""
        return {"h_ref": self.store.packed(taken)}

    def noise(self) -> NoiseFloor:
        exact, stored = (self._latents(self.store.noise[name]) for name in ("exact", "stored"))
        return NoiseFloor(exact, stored)

    def _latents(self, h: Tensor) -> Tensor:
        z = self.sae.to("cpu", h.dtype).encode_latents(h)
        return z if self.threshold is None else z.where(z > self.threshold.cpu(), 0.0)
