"""The files of a cache: tensors under a name that holds their SHA-256, so that damage of any kind shows."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lockin_fast.rundir import hash_files, write_bytes

NOISE = "noise"  # the item beside the shards
_NAME = re.compile(r"(?P<item>[a-z]+(?:-\d+)?)\.(?P<digest>[0-9a-f]{64})\.safetensors")


class CacheError(ValueError):
    """A cache that cannot be used; the message is one line that names what differs or is damaged, and what to do."""


def write_item(folder: Path, item: str, tensors: Mapping[str, Tensor]) -> Path:
    """Write `tensors` as the file of `item` ("noise", "shard-00003"), whole or not at all; return its path."""
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    path = folder / f"{item}.{hashlib.sha256(content).hexdigest()}.safetensors"
    write_bytes(path, content)
    return path


def find_items(folder: Path) -> dict[str, Path]:
    """{item: file} of what is there under its final name, which is complete."""
    found = {}
    for path in sorted(folder.iterdir()):
        if match := _NAME.fullmatch(path.name):
            found[match["item"]] = path
    return found


def is_whole(path: Path) -> bool:
    """Whether the content of a file is the one that its name promises. Reads all of it."""
    return hash_files(path)[path.name] == _NAME.fullmatch(path.name)["digest"]


def open_item(path: Path, *, verify: bool) -> dict[str, Tensor]:
    """The tensors of a file, mapped into memory: read from disk where they are touched.

    Raises CacheError for a file that is not as it was written: always for one of another size, for any other change
    with verify=True.
    """
    damaged = f"cache: {path} is damaged{{}}; run `lockin-fast cache` again, which writes that file anew"
    if verify and not is_whole(path):
        raise CacheError(damaged.format(": its content is not what its name promises"))
    try:
        with safe_open(path, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}
    except SafetensorError as error:
        raise CacheError(damaged.format(f": {error}")) from error
