"""The state of a stack in training, on disk: one file that is replaced whole, and read back to the same bytes."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockin_fast.rundir import RunError, held_partial

SECONDS = 30.0  # at least, between two writes
SHARE = 0.05  # of the time may go into writing
_HEADER = "stack"
_AGAIN = "remove it, and the stack trains from its beginning"


class Checkpoint:
    """Where a stack's state is kept: `path` is written, `source` (None: path) read, if it exists.

    It is due when `seconds` have passed since the last time and 95% of the time has gone elsewhere. Cost of a write: 12
    bytes for every trained parameter of the stack.
    """

    def __init__(self, path: str | os.PathLike, *, source: str | os.PathLike | None = None, seconds: float = SECONDS):
        self.path, self.source = Path(path), Path(source or path)
        self._seconds, self._last, self._cost = seconds, time.monotonic(), 0.0

    def due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() - self._last >= max(self._seconds, self._cost / SHARE)

    def write(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Replace the file. Raises RunError where it cannot be written."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        start = time.monotonic()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with held_partial(self.path, folder=False) as temporary:
                save_file(dict(tensors), temporary, metadata={_HEADER: json.dumps(state)})
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, self.path)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{self.path}: the stack's state cannot be written: {error}; make room") from error
        self._last = time.monotonic()
        self._cost = self._last - start

    def read(self, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """(tensors, state) as they were written, None where there is no file. Raises RunError for a damaged one."""
        from safetensors import SafetensorError, safe_open

        if not self.source.exists():
            return None
        try:
            with safe_open(self.source, framework="pt", device=str(device)) as file:
                state = json.loads(file.metadata()[_HEADER])
                return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118, no mapping
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise RunError(f"{self.source}: cannot be read ({error}); {_AGAIN}") from error


def check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise RunError, naming what differs, unless the state at `path` is of a stack like this one."""
    for name, value in json.loads(json.dumps(now)).items():
        if before.get(name) != value:
            raise RunError(
                f"{path}: the state of another stack: {name} was {before.get(name)!r}, now it is {value!r}; {_AGAIN}"
            )


def stored_state(path: Path) -> dict[str, Any]:
    """The state in the file without its tensors, {} where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()[_HEADER])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        return {}
