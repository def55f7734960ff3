"""``load_sae``: find out which format a path holds, and hand it to that format's reader."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lockin_fast.sae.container import DTYPES, SparseAutoencoder
from lockin_fast.sae.dictionary_learning import read_dictionary_learning
from lockin_fast.sae.formats import CONFIGS, EXPECTED, PICKLES, WEIGHTS, formats_in, lone_pickles
from lockin_fast.sae.gemma_scope import read_gemma_scope
from lockin_fast.sae.goodfire import read_goodfire
from lockin_fast.sae.hub import HubPath, fetch, hub_path
from lockin_fast.sae.llama_scope import read_llama_scope, read_llama_scope_openmoss
from lockin_fast.sae.options import ReadOptions
from lockin_fast.sae.qwen_scope import TENSORS as QWEN_SCOPE_TENSORS
from lockin_fast.sae.qwen_scope import read_qwen_scope
from lockin_fast.sae.saelens import read_saelens
from lockin_fast.sae.sparsify import read_sparsify
from lockin_fast.sae.tensor_file import TensorFile

READERS = {
    "saelens": read_saelens,
    "dictionary_learning": read_dictionary_learning,
    "goodfire": read_goodfire,
    "gemma_scope": read_gemma_scope,
    "llama_scope": read_llama_scope,
    "llama_scope_openmoss": read_llama_scope_openmoss,
    "sparsify": read_sparsify,
    "qwen_scope": read_qwen_scope,
}


def load_sae(
    path: str | Path,
    *,
    latents: Tensor | Sequence[int] | None = None,
    format: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    input_scale: float | None = None,
    fold_decoder_norm: bool | None = None,
) -> SparseAutoencoder:
    """Read a sparse autoencoder from a directory or file, or from the Hugging Face hub.

    ``path``: a directory or file, or ``[hf://]owner/name[@revision][/folder or file]`` on the hub; what exists on this
    machine wins. Only the files that the SAE needs are downloaded, into the hub's cache.
    ``latents``: read only these rows, in this order; memory is then that of the rows and one block of the file.
    ``format``: ``saelens``, ``dictionary_learning``, ``goodfire``, ``gemma_scope``, ``llama_scope`` (as SAELens reads
    it) or ``llama_scope_openmoss`` (as its authors do), ``sparsify``, ``qwen_scope``; found from the files when None.
    ``dtype``: of ``weight``, ``decoder`` and ``decoder_bias``; None keeps the file's. Bias and threshold are fp32.
    ``input_scale``: the factor on the input of SAELens' ``expected_average_only_in``, which is not in the checkpoint.
    ``fold_decoder_norm``: True gives z in units of unit decoder rows (z times the norm of the stored row), False as
    stored; None does what the original library's own loader does: plain ``AutoEncoder`` of dictionary_learning and
    SAELens files with ``rescale_acts_by_decoder_norm`` are folded, as are ``llama_scope_openmoss``, all others not.
    ``metadata`` records which.

    Raises FileNotFoundError for a missing path or file, ValueError for an unknown format, a damaged or inconsistent
    file, an unsupported setting, NaN or Inf, or a latent out of range or named twice. Pickles are read with
    ``weights_only=True`` and never executed. What :func:`lockin_fast.sae.hub.fetch` raises for an id on the hub.
    """
    hub = path if isinstance(path, HubPath) else hub_path(path) if isinstance(path, str) else None
    path = Path(path) if hub is None else fetch(hub)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory; expected an SAE: {EXPECTED}")
    if format is not None and format not in READERS:
        raise ValueError(f"format must be one of {', '.join(READERS)}, got {format!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
    if input_scale is not None and not (input_scale > 0 and math.isfinite(input_scale)):
        raise ValueError(f"input_scale must be positive and finite, got {input_scale!r}")
    read = READERS[format or detect_format(path)]
    sae = read(path, ReadOptions(latents, input_scale, fold_decoder_norm))
    return sae if dtype is None and device is None else sae.to(device=device, dtype=dtype)


def detect_format(path: Path) -> str:
    """The format a path holds, by its files' names, for a pickle by its tensors' names.

    Raises ValueError that lists what was found.
    """
    if path.is_file() and path.suffix in PICKLES:
        return _pickle_format(path)
    directory = path if path.is_dir() else path.parent
    if path.is_file() and directory.name == "checkpoints":
        directory = directory.parent
    names = {entry.name for entry in directory.iterdir()}
    names |= {f"checkpoints/{entry.name}" for entry in directory.glob("checkpoints/*")}
    found = formats_in(names)
    if path.is_file():
        given = path.relative_to(directory).as_posix()
        found = [format for format in found if given in (*WEIGHTS[format], *CONFIGS[format])]
        names = {path.name}
    elif not found and len(pickles := lone_pickles(names)) == 1:
        found = [format for format in (_pickle_format(directory / pickles[0]),) if format != "dictionary_learning"]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{path}: holds more than one SAE ({', '.join(found)}); choose with format=")
    listing = ", ".join(sorted(names)[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
    raise ValueError(f"{path}: no SAE recognised; found {listing}; expected {EXPECTED}")


def _pickle_format(path: Path) -> str:
    """By its tensors. Qwen-Scope's names occur in dictionary_learning too, but there with a threshold."""
    tensors = TensorFile(path).shapes.keys()
    if "encoder_linear.weight" in tensors:
        return "goodfire"
    return "qwen_scope" if tensors == QWEN_SCOPE_TENSORS else "dictionary_learning"
