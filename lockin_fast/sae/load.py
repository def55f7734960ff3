"""``load_sae``: find out which format a path holds, and hand it to that format's reader."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lockin_fast.sae.container import DTYPES, SparseAutoencoder
from lockin_fast.sae.dictionary_learning import read_dictionary_learning
from lockin_fast.sae.goodfire import read_goodfire
from lockin_fast.sae.options import ReadOptions
from lockin_fast.sae.saelens import CONFIG, WEIGHTS, read_saelens
from lockin_fast.sae.tensor_file import TensorFile

READERS = {
    "saelens": read_saelens,
    "dictionary_learning": read_dictionary_learning,
    "goodfire": read_goodfire,
}
PICKLES = (".pt", ".pth")
EXPECTED = f"saelens ({CONFIG} + {WEIGHTS}), dictionary_learning (ae.pt + config.json), goodfire (one .pth or .pt)"


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
    """Read a sparse autoencoder from a directory or file.

    ``latents``: read only these rows, in this order; memory is then that of the rows and one block of the file.
    ``format``: ``saelens``, ``dictionary_learning`` or ``goodfire``; found from the files when None.
    ``dtype``: of ``weight``, ``decoder`` and ``decoder_bias``; None keeps the file's. Bias and threshold are fp32.
    ``input_scale``: the factor on the input of SAELens' ``expected_average_only_in``, which is not in the checkpoint.
    ``fold_decoder_norm``: True gives z in units of unit decoder rows (z times the norm of the stored row), False as
    stored; None does what the original library's own loader does: plain ``AutoEncoder`` of dictionary_learning and
    SAELens files with ``rescale_acts_by_decoder_norm`` are folded, all others not. ``metadata`` records which.

    Raises FileNotFoundError for a missing path or file, ValueError for an unknown format, a damaged or inconsistent
    file, an unsupported setting, NaN or Inf, or a latent out of range or named twice. Pickles are read with
    ``weights_only=True`` and never executed. Formats: SAELens, saprmarks/dictionary_learning, Goodfire.
    """
    path = Path(path)
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
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else {path.name}
    pickles = [name for name in names if Path(name).suffix in PICKLES]
    found = []
    if WEIGHTS in names or (path.is_file() and path.name == CONFIG):
        found.append("saelens")
    if "ae.pt" in names:
        found.append("dictionary_learning")
    elif len(pickles) == 1 and _pickle_format(path / pickles[0]) == "goodfire":
        found.append("goodfire")
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{path}: holds more than one SAE ({', '.join(found)}); choose with format=")
    listing = ", ".join(sorted(names)[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
    raise ValueError(f"{path}: no SAE recognised; found {listing}; expected {EXPECTED}")


def _pickle_format(path: Path) -> str:
    return "goodfire" if "encoder_linear.weight" in TensorFile(path) else "dictionary_learning"
