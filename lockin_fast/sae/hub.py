"""SAEs on the Hugging Face hub: what an id stands for, and the few files of it that are needed, downloaded once."""

import re
from functools import lru_cache
from pathlib import Path, PurePosixPath

from lockin_fast.sae.formats import CONFIGS, PICKLES, WEIGHTS, formats_in, lone_pickles

SCHEME = "hf://"
WEIGHT_SUFFIXES = (*PICKLES, ".npz", ".safetensors")
_PART = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(rf"({_PART}/{_PART})(?:@([\w.-]+))?(?:/({_PART}(?:/{_PART})*))?/?")


class HubPath(str):
    """``[hf://]owner/name[@revision][/folder or file]``, plain text otherwise. Its parts raise ValueError for less."""

    @property
    def repo(self) -> str:
        return self._match()[1]

    @property
    def revision(self) -> str | None:
        return self._match()[2]

    @property
    def inside(self) -> str:
        return self._match()[3] or ""

    def _match(self) -> re.Match:
        match = _ID.fullmatch(self.removeprefix(SCHEME))
        if match is None:
            raise ValueError(f"{self}: expected {SCHEME}owner/name[@revision][/folder or file]")
        return match


def hub_path(text: str, folder: Path = Path()) -> HubPath | None:
    """The hub id that ``text`` is, or None when it is a path: what exists, seen from ``folder``, wins over an id.

    An id needs no ``hf://`` in front (``google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71``).
    """
    if text.startswith(SCHEME) or _ID.fullmatch(text) and not Path(folder, text).exists():
        return HubPath(SCHEME + text.removeprefix(SCHEME).rstrip("/"))
    return None


@lru_cache
def fetch(path: HubPath) -> Path:
    """The folder or file that ``path`` names, in the hub's cache on this machine; only what an SAE needs is downloaded.

    Where the hub is not asked (``HF_HUB_OFFLINE=1``, as on the command line) or cannot be reached, what an earlier
    download left is used. Raises FileNotFoundError for a repository, folder or file that does not exist, ValueError for
    a place that holds no SAE or several, OSError without a connection, ImportError without huggingface_hub.
    """
    repo, revision = path.repo, path.revision
    try:
        from huggingface_hub import constants, errors
    except ImportError as error:
        raise ImportError(f"{path}: the hub needs huggingface_hub; pip install huggingface_hub") from error
    if constants.HF_HUB_OFFLINE:
        return _cached(path, "HF_HUB_OFFLINE is set; HF_HUB_OFFLINE=0 allows the download")
    try:
        return _download(path)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        place = f"{repo}@{revision}" if revision else repo
        raise FileNotFoundError(
            f"{path}: no such path here, and no repository {place} on the hub that you may read "
            "(private and gated ones need: hf auth login)"
        ) from error
    except (FileNotFoundError, ValueError):
        raise
    except Exception as error:  # whatever the transport raises
        line = (str(error).splitlines() or [""])[0]
        return _cached(path, f"the hub cannot be reached ({type(error).__name__}: {line})")


def _download(path: HubPath) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    files = needed_files(path, HfApi().list_repo_files(path.repo, revision=path.revision))
    for file in files:
        local = Path(hf_hub_download(path.repo, file, revision=path.revision))
    root = local.parents[len(PurePosixPath(file).parts) - 1]
    return _place(root, path, files)


def _cached(path: HubPath, why: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        root = Path(snapshot_download(path.repo, revision=path.revision, local_files_only=True))
    except Exception as error:  # LocalEntryNotFoundError, in all its bases over the versions
        raise FileNotFoundError(f"{path}: no such path here, not downloaded earlier, and {why}") from error
    try:
        files = needed_files(path, [file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()])
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{error} (among the files downloaded earlier; {why})") from error
    return _place(root, path, files)


def _place(root: Path, path: HubPath, files: list[str]) -> Path:
    """A lone file itself, whatever else of the repository lies beside it; otherwise what `path` names."""
    return root / (files[0] if len(files) == 1 else path.inside)


def needed_files(path: HubPath, files: list[str]) -> list[str]:
    """Of the repository's `files`, those that reading the SAE at `path` takes. Raises as :func:`fetch` does."""
    inside = PurePosixPath(path.inside)
    folder = inside.parent if path.inside in files else inside
    if folder != inside and folder.name == "checkpoints":
        folder = folder.parent
    below = _below(folder, files)
    if not below:
        raise FileNotFoundError(f"{path}: {path.repo} has no {path.inside or 'file'}; {_places(path.repo, files)}")
    if folder != inside and inside.suffix in WEIGHT_SUFFIXES:
        weights = {str(inside.relative_to(folder))}
    else:
        pickles = lone_pickles(below)
        weights = {name for format in formats_in(below) for name in WEIGHTS[format]} & below
        weights = weights or set(pickles if len(pickles) == 1 else ())
    if not weights:
        raise ValueError(f"{path}: no SAE, or several, directly in this folder; {_places(path.repo, files, folder)}")
    configs = {name for of_format in CONFIGS.values() for name in of_format} & below
    return sorted(str(folder / name) for name in weights | configs)


def _below(folder: PurePosixPath, files: list[str]) -> set[str]:
    prefix = "" if folder == PurePosixPath() else f"{folder}/"
    return {file.removeprefix(prefix) for file in files if file.startswith(prefix)}


def _places(repo: str, files: list[str], folder: str | PurePosixPath = "") -> str:
    """Where in a repository, below `folder`, there are SAEs: a few examples."""
    weights = {name for of_format in WEIGHTS.values() for name in of_format}
    below = [PurePosixPath(folder, name) for name in _below(PurePosixPath(folder), files)]
    found = {file.parent for file in below if file.name in weights}
    found |= {file.parent.parent for file in below if "/".join(file.parts[-2:]) in weights}
    found |= {file for file in below if file.name not in weights and file.suffix in PICKLES}
    shown = sorted(map(str, found), key=lambda place: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", place)])
    return f"{repo} has SAEs at {', '.join(shown[:4])}{', ...' if len(shown) > 4 else ''}" if shown else "it has no SAE"
