"""Named tensors of one checkpoint file, read a block at a time.

A file is mapped anew for every block (an archive of numpy arrays is streamed), so what is resident is bounded by the
block, not by the file: twenty latents of a 2 GB encoder cost the block, whichever way the matrix is stored.
"""

import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from lockin_fast.sae.container import DTYPES, is_finite
from lockin_fast.sae.npz import NpzFile

BLOCK_BYTES = 32 << 20


class TensorFile:
    """A ``.safetensors`` file, a ``.npz`` archive, or a ``.pt``/``.pth`` pickle (``weights_only=True, mmap=True``).

    Nested dictionaries of a pickle are flattened with dots; numbers count as tensors without dimensions; anything
    else in it is ignored. ``shapes`` maps every name to its shape. Raises FileNotFoundError, or ValueError for a file
    that is damaged, holds anything but data, or whose tensors do not have the shape or dtype asked for.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such file")
        self._map: Callable[[Path], AbstractContextManager]
        if self.path.suffix == ".npz":
            archive = NpzFile(self.path)  # its streams stay open from block to block: they only go forward
            self._map = lambda path: nullcontext(archive)
        else:
            self._map = _map_safetensors if self.path.suffix == ".safetensors" else _map_pickle
        with self._map(self.path) as tensors:
            shapes = {name: tuple(_stored_shape(tensors[name])) for name in tensors}
            self._reversed = {name for name in tensors if getattr(tensors[name], "reversed", False)}
        self.shapes = {name: shape[::-1] if name in self._reversed else shape for name, shape in shapes.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        """The shape of a tensor that must exist and have ``dims`` dimensions."""
        if name not in self.shapes:
            raise ValueError(f"{self.path}: tensor {name!r} is missing; the file has {_some(self.shapes)}")
        if len(self.shapes[name]) != dims:
            raise ValueError(f"{self.path}: tensor {name!r} must have {dims} dimension(s), got {self.shapes[name]}")
        return self.shapes[name]

    def number(self, name: str) -> float:
        """A tensor of one element, as a Python number."""
        if name not in self.shapes or self.shapes[name] not in ((), (1,)):
            raise ValueError(f"{self.path}: {name!r} must be a single number, got {self.shapes.get(name, 'nothing')}")
        with self._map(self.path) as tensors:
            return tensors[name][...].item()

    def vector(self, name: str, size: int, index: Tensor | None = None, *, infinite: bool = False) -> Tensor:
        """Entries ``index`` (None = all) of a tensor of ``size`` elements. ``infinite`` lets Inf pass, never NaN."""
        if self.shape(name, 1) != (size,):
            raise ValueError(f"{self.path}: tensor {name!r} must have shape [{size}], got {list(self.shapes[name])}")
        with self._map(self.path) as tensors:
            values = self._floats(name, tensors[name][...])
            values = values.clone() if index is None else values[index]
        if values.isnan().any() if infinite else not is_finite(values):
            raise ValueError(f"{self.path}: tensor {name!r} holds NaN or Inf")
        return values

    def rows(self, name: str, size: tuple[int, int], index: Tensor | None = None) -> Tensor:
        """Rows ``index`` (None = all) of a tensor stored as ``size = [F, d]``: ``[K, d]``."""
        self._check_matrix(name, size)
        read = self._across if name in self._reversed else self._along
        return self._checked(name, read(name, *size, index), index)

    def columns(self, name: str, size: tuple[int, int], index: Tensor | None = None) -> Tensor:
        """Columns ``index`` (None = all) of a tensor stored as ``size = [d, F]``, as rows: ``[K, d]``."""
        self._check_matrix(name, size)
        d_model, width = size
        read = self._along if name in self._reversed else self._across
        return self._checked(name, read(name, width, d_model, index), index)

    def _along(self, name: str, width: int, d_model: int, index: Tensor | None) -> Tensor:
        """Latents of a matrix in which each is a row; in the file's order, as a stream cannot go back."""
        index = torch.arange(width) if index is None else index
        order = index.argsort()
        out = None
        for start, stop in _blocks(len(index), d_model):
            with self._map(self.path) as tensors:
                stored = tensors[name]
                runs = _runs(index[order[start:stop]].tolist())
                block = self._floats(name, torch.cat([stored[first:last] for first, last in runs]))
            out = torch.empty(len(index), d_model, dtype=block.dtype) if out is None else out
            out[order[start:stop]] = block
        return torch.empty(0, d_model) if out is None else out

    def _across(self, name: str, width: int, d_model: int, index: Tensor | None) -> Tensor:
        """Latents of a matrix in which each is a column: all of it is read, a block of rows at a time."""
        count = width if index is None else len(index)
        out = None
        for start, stop in _blocks(d_model, width):
            with self._map(self.path) as tensors:
                block = self._floats(name, tensors[name][start:stop])
                out = torch.empty(count, d_model, dtype=block.dtype) if out is None else out
                out[:, start:stop] = (block if index is None else block.index_select(1, index)).T
        return torch.empty(count, 0) if out is None else out

    def _check_matrix(self, name: str, size: tuple[int, int]) -> None:
        shape = self.shape(name, 2)
        if shape != tuple(size):
            raise ValueError(f"{self.path}: tensor {name!r} must have shape {list(size)}, got {list(shape)}")

    def _floats(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
            raise ValueError(
                f"{self.path}: tensor {name!r} is {tensor.dtype} ({tensor.layout}); expected a dense tensor of "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}"
            )
        return tensor

    def _checked(self, name: str, rows: Tensor, index: Tensor | None) -> Tensor:
        if not is_finite(rows):
            bad = int((~rows.isfinite()).any(dim=1).nonzero()[0])
            raise ValueError(
                f"{self.path}: tensor {name!r} holds NaN or Inf (latent {bad if index is None else int(index[bad])})"
            )
        return rows


def _stored_shape(tensor) -> tuple[int, ...]:
    return tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape


class _SafeTensors:
    """Mapping of names to lazy slices over one open safetensors file."""

    def __init__(self, handle):
        self.handle = handle

    def __iter__(self):
        return iter(self.handle.keys())

    def __getitem__(self, name: str):
        return self.handle.get_slice(name)


@contextmanager
def _map_safetensors(path: Path) -> Iterator[_SafeTensors]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(f"{path}: reading .safetensors needs safetensors; pip install safetensors") from error
    try:
        handle = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({_first_line(error)})") from error
    with handle:
        yield _SafeTensors(handle)


@contextmanager
def _map_pickle(path: Path) -> Iterator[dict[str, Tensor]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: refused: the pickle holds more than tensors, or is damaged; export the SAE as a state dict"
        ) from error
    except Exception as error:  # a damaged pickle can make the unpickler raise anything
        raise ValueError(f"{path}: not a readable torch checkpoint ({_first_line(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a state dict, got {type(content).__name__}")
    yield _flatten(content)


def _flatten(content: dict, prefix: str = "") -> dict[str, Tensor]:
    flat = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            flat[f"{prefix}{key}"] = value.detach()
        elif isinstance(value, (int, float)):
            flat[f"{prefix}{key}"] = torch.tensor(value)
    return flat


def _blocks(count: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK_BYTES // (4 * max(1, width)))
    return ((start, min(count, start + step)) for start in range(0, count, step))


def _runs(index: list[int]) -> list[tuple[int, int]]:
    """Consecutive indices as half-open ranges, in order."""
    runs: list[tuple[int, int]] = []
    for latent in index:
        if runs and runs[-1][1] == latent:
            runs[-1] = (runs[-1][0], latent + 1)
        else:
            runs.append((latent, latent + 1))
    return runs


def _some(names) -> str:
    names = sorted(names)
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "no tensors"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
