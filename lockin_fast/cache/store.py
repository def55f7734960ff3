"""An opened cache: an index of all its tokens in memory, their values on disk."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockin_fast.cache.files import NOISE, CacheError, find_items, open_item
from lockin_fast.cache.noise import NoiseFloor

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}


class TokenStore:
    """Values of tokens, found by their keys (see `token_keys`); memory-mapped, 16 bytes a token in memory.

    Raises CacheError when a shard is missing or damaged. Pickled, it is opened again by its path.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], *, verify: bool = True):
        self.path, self.manifest = path, manifest
        items = find_items(path)
        names = [NOISE, *(shard_name(i) for i in range(manifest["shards"]))]
        if missing := [name for name in names if name not in items]:
            raise CacheError(
                f"cache: {path} is not complete: {len(missing)} of {len(names)} files are missing ({missing[0]}, ...); "
                "run `lockin-fast cache` again, which goes on where it stood"
            )
        opened = [open_item(items[name], verify=verify) for name in names]
        self.noise, self._shards = opened[0], opened[1:]
        keys = np.concatenate([shard["keys"].numpy().view(np.uint64) for shard in self._shards])
        self._order = keys.argsort()
        self._keys = keys[self._order]
        self._starts = np.cumsum([0, *(len(shard["keys"]) for shard in self._shards)])

    def __reduce__(self):
        from lockin_fast.cache import open_cache

        return open_cache, (self.path, False)

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path}, {len(self):,} tokens, layer {self.layer}, {self.manifest['dtype']})"

    @property
    def layer(self) -> int:
        """0-based index of the decoder layer whose output was cached."""
        return self.manifest["layer"]

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states from which the cache was written."""
        return DTYPES[self.manifest["dtype"]]

    @property
    def nbytes(self) -> int:
        """Size on disk, without the small files."""
        return sum(tensor.nbytes for shard in self._shards for tensor in shard.values())

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Where the tokens with these keys (uint64 [n]) lie, for `gather`; -1 for one that is not cached."""
        at = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return np.where(self._keys[at] == keys, self._order[at], -1)

    def gather(self, name: str, place: np.ndarray, columns: Tensor | None = None) -> Tensor:
        """The values [n, w] called `name` of the tokens at `place`, of these columns (int64) where given."""
        stored = self._shards[0][name]
        out = torch.empty((len(place), stored.shape[1] if columns is None else len(columns)), dtype=stored.dtype)
        shard = np.searchsorted(self._starts, place, side="right") - 1
        for number in np.unique(shard):
            rows = np.flatnonzero(shard == number)
            index = torch.from_numpy(place[rows] - self._starts[number])
            values = self._shards[number][name]
            out[torch.from_numpy(rows)] = values[index] if columns is None else values[index[:, None], columns]
        return out


class Reference(ABC):
    """What a penalty reads of a cache."""

    store: TokenStore

    @abstractmethod
    def take(self, place: np.ndarray) -> dict[str, Tensor]:
        """What the data loader adds to a batch of the tokens at `place`, each [n, ...]."""

    @abstractmethod
    def arguments(self, taken: dict[str, Tensor]) -> dict[str, Any]:
        """Keyword arguments of `block_penalty` from what `take` gave, each [B, S, ...], on the device of training."""

    @abstractmethod
    def noise(self) -> NoiseFloor:
        """The noise floor of these latents."""


def shard_name(number: int) -> str:
    return f"shard-{number:05}"
