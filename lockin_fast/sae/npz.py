"""Arrays of a ``.npz`` archive, read forward in blocks: what is held is a block, also of a compressed member."""

import math
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SUFFIX = ".npy"


class NpzFile:
    """Mapping of names to :class:`NpzArray` over one open archive. Raises ValueError, naming the file, when damaged."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._archive = zipfile.ZipFile(path)
            names = [name for name in self._archive.namelist() if name.endswith(SUFFIX)]
            self._arrays = {name.removesuffix(SUFFIX): NpzArray(self._archive, name, path) for name in names}
        except (zipfile.BadZipFile, OSError, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{path}: not a readable .npz archive ({_first_line(error)})") from error

    def __iter__(self):
        return iter(self._arrays)

    def __getitem__(self, name: str) -> "NpzArray":
        return self._arrays[name]


class NpzArray:
    """One array. Slices of its leading dimension are read in order: going back starts the member again.

    An array stored column by column (``np.save`` of a transposed view) is ``reversed``: ``shape`` and slices are those
    of its transpose, which lies row by row.
    """

    def __init__(self, archive: zipfile.ZipFile, name: str, path: Path):
        self._archive, self._name, self._path = archive, name, path
        self._stream = archive.open(name)
        shape, self.reversed, self._dtype = self._header()
        self.shape = shape[::-1] if self.reversed else shape
        self._start = self._stream.tell()
        stored = archive.getinfo(name).file_size - self._start
        if self._dtype.hasobject or stored != math.prod(shape) * self._dtype.itemsize:
            raise ValueError(
                f"{path}: array {name!r} is {self._dtype} {list(shape)}, but takes {stored} bytes; save plain numbers"
            )

    def __getitem__(self, rows) -> Tensor:
        """All of it (``[...]``), or the rows of a slice with step 1."""
        if rows is Ellipsis:
            return self._read(0, math.prod(self.shape), self.shape)
        start, stop, _ = rows.indices(self.shape[0])
        row = math.prod(self.shape[1:])
        return self._read(start * row, max(0, stop - start) * row, (max(0, stop - start), *self.shape[1:]))

    def _header(self) -> tuple[tuple[int, ...], bool, np.dtype]:
        try:
            version = np.lib.format.read_magic(self._stream)
            if version == (1, 0):
                return np.lib.format.read_array_header_1_0(self._stream)
            return np.lib.format.read_array_header_2_0(self._stream)
        except Exception as error:  # a damaged header can make numpy's parser raise anything
            raise ValueError(f"{self._path}: array {self._name!r}: {_first_line(error)}") from error

    def _read(self, first: int, count: int, shape: tuple[int, ...]) -> Tensor:
        array = np.empty(count, self._dtype)
        into = memoryview(array).cast("B") if count else memoryview(b"")
        try:
            self._stream.seek(self._start + first * self._dtype.itemsize)
            done = 0
            while done < len(into):
                got = self._stream.readinto(into[done:])
                if not got:
                    raise EOFError("it ends early")
                done += got
        except (zipfile.BadZipFile, OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{self._path}: array {self._name!r} is damaged ({_first_line(error)})") from error
        try:
            return torch.from_numpy(array).view(shape)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self._path}: array {self._name!r}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
