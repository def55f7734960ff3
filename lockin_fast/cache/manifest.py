"""What a cache was written from, and the error that names the first thing in which another use differs."""

import fcntl
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lockin_fast.cache.files import NOISE, CacheError
from lockin_fast.rundir import MANIFEST, write_json

FORMAT = 2  # 2: the key has the model's configuration
REMEDY = "use what the cache was written for, or write another in a new folder: lockin-fast cache CONFIG"
_HINTS = {
    "text": "text, tokenizer, chat template or max_length",
    "sae": "SAE",
    "model": "model",
    "config": "model",
}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the cache in `folder`. Raises CacheError where there is none, or one of another format."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise CacheError(f"cache: {folder} holds no cache; write one first: lockin-fast cache CONFIG")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        stored = manifest["cache_format"]
    except (ValueError, KeyError, TypeError):
        raise CacheError(f"cache: {path} is not the manifest of a cache; give another folder") from None
    if stored != FORMAT:
        raise CacheError(f"cache: {path} has format {stored}, this version reads {FORMAT}; write the cache again")
    return manifest


def settled_manifest(folder: Path, key: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The manifest in `folder`; where there is none, one of `key` and what `make()` adds. One process makes it.

    Raises CacheError when the folder holds another cache, whose first difference in `key` is named, or other files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other ranks wait here for the first
        if not (folder / MANIFEST).exists():
            # A kill may have left the noise; shards without a manifest may be of anything.
            strangers = [path.name for path in folder.iterdir() if not path.name.startswith((".", f"{NOISE}."))]
            if strangers:
                raise CacheError(f"cache: {folder} already holds {min(strangers)} and is no cache; give a new folder")
            write_json(folder / MANIFEST, {"cache_format": FORMAT, **key, **make()})
    manifest = read_manifest(folder)
    check_same(folder, {name: manifest.get(name) for name in key}, key, "give another folder, or remove it")
    return manifest


def check_same(folder: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any], remedy: str) -> None:
    """Raise CacheError that names the first field of `wanted` in which `stored` differs."""
    if found := _difference(stored, json.loads(json.dumps(wanted)), ""):
        field, before, now = found
        what = _HINTS.get(field.partition(".")[0], "")
        raise CacheError(
            f"cache: {folder} was written for another {f'{what} ({field})' if what else field}: there it is "
            f"{_short(before)}, here {_short(now)}; {remedy}"
        )


def _difference(stored, wanted, field: str) -> tuple[str, Any, Any] | None:
    if isinstance(stored, Mapping) and isinstance(wanted, Mapping):
        for name in [*wanted, *(name for name in stored if name not in wanted)]:
            below = f"{field}.{name}" if field else name
            if found := _difference(stored.get(name), wanted.get(name), below):
                return found
        return None
    return None if stored == wanted else (field, stored, wanted)


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
