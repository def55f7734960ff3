"""Caches of the base model on disk: reference latents, exact, and hidden states in four bits.

They need torch alone; what runs a model over text to write one is `lockin_fast.blocking.write_cache`.
"""

from pathlib import Path

from lockin_fast.cache.files import CacheError
from lockin_fast.cache.hidden_states import HiddenStateCache
from lockin_fast.cache.latents import LatentCache
from lockin_fast.cache.manifest import read_manifest
from lockin_fast.cache.store import TokenStore

__all__ = ["CacheError", "HiddenStateCache", "LatentCache", "TokenStore", "open_cache"]


def open_cache(path: str | Path, verify: bool = True) -> LatentCache | HiddenStateCache:
    """Open the cache that was written to the folder `path`; give it to `BlockPenalty` as reference=.

    verify: read every file once and compare it with its SHA-256 (about a second a gigabyte); without it, only files of
    a wrong size are found. Raises CacheError, one line, for a folder without a cache, one that is not complete, or a
    damaged file. Costs 16 bytes of memory a token; values stay on disk.
    """
    path = Path(path)
    manifest = read_manifest(path)
    kinds = {"latents": LatentCache, "hidden_states": HiddenStateCache}
    return kinds[manifest["kind"]](path, manifest, verify=verify)
