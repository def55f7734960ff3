"""Run directories: written atomically, claimed by one configuration, safe to kill and to resume.

Anything that appears under its final name is complete: files and folders are written under a hidden name beside it,
flushed to disk and renamed. The hidden name is unique, ends in `.partial` and is locked while its writer lives, so that
writers never meet, and what a killed one leaves behind is told from what another is still writing.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PARTIAL = ".partial"
MANIFEST = "manifest.json"


class RunError(ValueError):
    """A run directory that cannot be used or written; the message is one line that says why and what to do."""


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader, or a crash, sees either the old file or the whole new one."""
    with held_partial(path, folder=False) as temporary:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically; a number that is not finite becomes null, which every JSON reader accepts."""
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    write_text(path, "".join(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file, empty lines left out."""
    with open(path, encoding="utf-8") as file:  # whose lines end at line feeds alone, unlike those of str.splitlines
        return [json.loads(line) for line in file if line.strip()]


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a hidden folder to fill; it becomes `path` when the block ends, and is removed when the block raises.

    An empty folder at `path` is replaced; anything else there is kept, and raises FileExistsError.
    Raises RunError when the disk is full or cannot be written: whatever library was writing, the cause is named.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"))
    try:
        with held_partial(path, folder=True) as temporary:
            yield temporary
            for folder, _, names in os.walk(temporary):
                for name in names:
                    with open(os.path.join(folder, name), "rb") as file:
                        os.fsync(file.fileno())
                _sync_folder(Path(folder))
            try:
                os.rename(temporary, path)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise FileExistsError(errno.EEXIST, "another process wrote it meanwhile", str(path)) from error
                raise
    except BaseException as error:
        if _is_disk_error(error):
            raise RunError(
                f"{path}: cannot be written: {_one_line(error)}; what was finished before is kept, "
                "make room and run the same command again"
            ) from error
        raise
    _sync_folder(path.parent)


@contextlib.contextmanager
def held_partial(path: Path, *, folder: bool) -> Iterator[Path]:
    """A new hidden file or folder beside `path`, locked meanwhile; what still has that name at the end is removed."""
    names = {"prefix": f".{path.name}.", "suffix": PARTIAL, "dir": path.parent}
    with contextlib.ExitStack() as stack:
        while True:
            if folder:
                temporary = Path(tempfile.mkdtemp(**names))
            else:
                descriptor, name = tempfile.mkstemp(**names)
                os.close(descriptor)
                temporary = Path(name)
            with contextlib.suppress(OSError):  # a file system without locks, or taken for a leftover just now
                fcntl.flock(stack.enter_context(_opened(temporary)), fcntl.LOCK_EX)
            if temporary.exists():
                break
        stack.callback(remove, temporary)
        os.chmod(temporary, (0o777 if folder else 0o666) & ~_umask())  # what tempfile makes is private
        yield temporary


def check_place(path: Path, needed_bytes: int) -> None:
    """Raise RunError unless `path` is, or can become, a folder on a disk with `needed_bytes` free. Leaves no trace."""
    if path.exists() and not path.is_dir():
        raise RunError(f"output: {path} is a file; give a folder")
    ancestor = next(parent for parent in [path, *path.parents] if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=ancestor) as file:
            file.write(b"\0" * 4096)
            file.flush()
        free = shutil.disk_usage(ancestor).free
    except OSError as error:
        raise RunError(f"output: {path} cannot be written: {error.strerror or error}") from error
    if free < needed_bytes:
        raise RunError(
            f"output: {path} needs about {needed_bytes / 1e6:,.1f} MB, but its disk has "
            f"{free / 1e6:,.1f} MB free; make room or give another folder"
        )


def hash_files(path: Path) -> dict[str, str]:
    """Return {relative name: SHA-256} of the file `path`, or of every file that is not hidden below the folder."""
    files = (
        [path]
        if path.is_file()
        else sorted(
            file
            for file in path.rglob("*")
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
    )
    hashes = {}
    for file in files:
        with open(file, "rb") as stream:
            digest = hashlib.sha256()
            while block := stream.read(1 << 20):
                digest.update(block)
        hashes[file.name if path.is_file() else str(file.relative_to(path))] = digest.hexdigest()
    return hashes


def check_claim(path: Path, command: str, entry: Mapping[str, Any], *, may_grow: Sequence[str] = ()) -> dict[str, Any]:
    """Raise RunError if `path` holds anything but an earlier run of the same `entry`; return its manifest, {} if new.

    `entry` is {"config": {dotted key: value}, "inputs": {name: {file: hash}}}. The first difference is named. Keys in
    `may_grow` are lists to which values may have been added since; "latents.*" says that keys may have been added that
    begin so, while those that were there stay what they are.
    """
    manifest_file = path / MANIFEST
    if not manifest_file.exists():
        strangers = [child.name for child in path.iterdir() if not child.name.startswith(".")] if path.is_dir() else []
        if strangers:
            raise RunError(
                f"output: {path} already holds {min(strangers)} and is not a run; give a new or empty folder"
            )
        return {}
    try:
        manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
        before = manifest.get(command, {})
        for part in ("config", "inputs"):
            _compare(path, command, before.get(part, {}) if before else entry[part], entry[part], may_grow)
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise RunError(f"output: {manifest_file} cannot be read ({_one_line(error)}); give another folder") from error
    return manifest


@contextlib.contextmanager
def claim(
    path: Path, command: str, entry: Mapping[str, Any], *, may_grow: Sequence[str] = ()
) -> Iterator[Callable[..., None]]:
    """Hold the run directory `path` for `command`: check it, record `entry` in its manifest, remove what a kill left.

    Yields `record(**more)`, which adds to the entry what is known only later; it stays there through later claims.
    One process at a time; raises RunError if another holds it.
    """
    check_claim(path, command, entry, may_grow=may_grow)
    with hold(path):
        manifest = check_claim(path, command, entry, may_grow=may_grow)
        remove_leftovers([*path.glob(f".*{PARTIAL}"), *path.glob(f"*/.*{PARTIAL}")])

        def record(**more: Any) -> None:
            manifest[command] = manifest.get(command, {}) | more
            write_json(path / MANIFEST, manifest)

        record(**entry)
        yield record


@contextlib.contextmanager
def hold(path: Path, lock: str = ".lock") -> Iterator[None]:
    """Hold the folder `path`, made if it is missing, through the lock file of this name in it.

    Raises RunError if another holds it. A lock ends with its process, however that ends.
    """
    path.mkdir(parents=True, exist_ok=True)
    with open(path / lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"output: {path} is in use by another process; wait for it or give another folder") from None
        yield


def remove(path: Path) -> None:
    """Delete a file or a folder tree, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(paths: Iterable[Path]) -> None:
    """Remove those of the partial files and folders that no live process holds."""
    for path in paths:
        try:
            with _opened(path) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(path)
        except OSError:
            pass  # being written, or gone meanwhile; a leftover that stays costs its space, no more


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor of a file or a folder, to lock it by."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _compare(path: Path, command: str, before: Mapping, now: Mapping, may_grow: Sequence[str]) -> None:
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if key in may_grow and set(old or ()) <= set(new or ()):
            continue
        if old is None and any(key.startswith(name[:-1]) for name in may_grow if name.endswith("*")):
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping) and old != new:
            name = min(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
            raise RunError(f"output: {path} holds another {command}: {key} differs (file {name}); give another folder")
        if old != new:
            raise RunError(
                f"output: {path} holds another {command}: {key} was {old!r}, now it is {new!r}; give another folder"
            )


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(child) for child in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_disk_error(error: BaseException) -> bool:
    full = isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EIO,
        errno.EROFS,
    )
    return full or any(text in str(error) for text in ("No space left", "File too large", "quota exceeded"))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _sync_folder(folder: Path) -> None:
    with _opened(folder) as descriptor:
        os.fsync(descriptor)
