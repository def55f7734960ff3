"""The state of a training, on disk: one file that is replaced whole, and read back to the same bytes."""

import contextlib
import json
import os
import time
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockin_fast.rundir import RunError, held_partial

PATIENCE = 25  # times what the last write took pass before the next, so that writing takes less than 4% of the time
_STATE, _CHECKSUM = "state", "crc32"
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
_BEFORE = ".before"  # of the file that the newest one replaced
_AGAIN = "remove it, and the training starts from its beginning"


class Checkpoint:
    """Where a training's state is kept: `path` is written, `source` (None: path) read, if it exists.

    It is due at once, and then whenever `PATIENCE` times as long as the last write took has gone by: after every step
    where a step takes that long, else after as few as keep writing below 4% of the time. Killed at any moment, the
    file is whole, since it is renamed into its place, and the one before it is kept beside it. A process that is killed
    loses nothing that it wrote, so nothing is flushed to the disk; a machine that loses power may damage a file, which
    its checksum tells.

    Cost of a write: 12 bytes for every trained parameter (weight and two moments), copied over those of the file before
    the last: new blocks on a disk would cost several times as much.
    """

    def __init__(self, path: str | os.PathLike, *, source: str | os.PathLike | None = None):
        self.path, self.source = Path(path), Path(source or path)
        self._last, self._cost = time.monotonic(), 0.0

    def due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() - self._last >= PATIENCE * self._cost

    def write(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Replace the file by these tensors, and a state that JSON can hold. Raises RunError where it cannot."""
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.synchronize(device)  # the steps that are queued there are no part of the cost
        start = time.monotonic()
        text = json.dumps(state)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with held_partial(self.path, folder=False) as temporary:
                if self.path.exists():
                    with contextlib.suppress(FileNotFoundError):
                        os.replace(before(self.path), temporary)
                _write(temporary, tensors, {_STATE: text, _CHECKSUM: _checksum(tensors, text)})
                with contextlib.suppress(FileNotFoundError):
                    os.replace(self.path, before(self.path))
                os.replace(temporary, self.path)
        except OSError as error:
            raise RunError(f"{self.path}: the training's state cannot be written: {error}; make room") from error
        self._last = time.monotonic()
        self._cost = self._last - start

    def read(self, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """(tensors, state) as they were written, None where there is no file.

        A damaged file is warned of and removed, and the one before it is read; None where that is damaged too.
        """
        found, damaged = None, []
        for path in (self.source, before(self.source)):
            if found is None and path.exists():
                try:
                    found = _read(path, device)
                except _errors() as error:
                    damaged.append(f"{path} is damaged ({' '.join(str(error).split())})")
                    path.unlink()
        for text in damaged:
            then = "goes on from the state before it" if found else "starts from its beginning"
            warnings.warn(f"{text}; the training {then}", stacklevel=2)
        return found

    def remove(self) -> None:
        """Remove what was written, which nothing needs any more."""
        for path in (before(self.path), self.path):
            path.unlink(missing_ok=True)


def before(path: Path) -> Path:
    """Where the file is kept that the one at `path` replaced."""
    return path.with_name(path.name + _BEFORE)


def after(path: Path) -> Path:
    """The file that replaced the one at `path`, or `path` itself where that is the newest."""
    return path.with_name(path.name.removesuffix(_BEFORE))


def check_same(path: Path, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise RunError, naming what differs, unless the state at `path` is of a training like this one."""
    for name, value in json.loads(json.dumps(now)).items():
        if stored.get(name) != value:
            raise RunError(
                f"{path}: the state of another training: {name} was {stored.get(name)!r}, now it is {value!r}; {_AGAIN}"
            )


def stored_state(path: Path) -> dict[str, Any]:
    """The state in the file, or in the one before it, without the tensors; {} where neither can be read."""
    from safetensors import safe_open

    for file in (path, before(path)):
        with contextlib.suppress(*_errors()), safe_open(file, framework="pt") as opened:
            return json.loads(opened.metadata()[_STATE])
    return {}


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file over what is at `path`, which the library itself only replaces."""
    header, start = {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        end = start + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    with open(path, "r+b") as file:
        for part in (len(text).to_bytes(8, "little"), text, *map(_bytes, tensors.values())):
            file.write(part)
        file.truncate()


def _read(path: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
    if header[_CHECKSUM] != _checksum(tensors, header[_STATE]):
        raise ValueError("its content is not what its checksum says")
    return {name: tensor.to(device) for name, tensor in tensors.items()}, json.loads(header[_STATE])


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """Eight hex digits: CRC-32 of the state and of every tensor, its name, type and shape."""
    found = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        found = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), found)
        found = zlib.crc32(_bytes(tensor), found)
    return f"{found:08x}"


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _errors() -> tuple[type[Exception], ...]:
    """What reading a damaged file raises."""
    from safetensors import SafetensorError

    return OSError, SafetensorError, TypeError, KeyError, ValueError
