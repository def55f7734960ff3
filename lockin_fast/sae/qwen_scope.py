"""Reader of Qwen-Scope: one ``layerN.sae.pt`` a layer, a state dict of four tensors; top-k.

    p = x W_enc^T + b_enc;  z = the k largest, then relu;  x' = z W_dec^T + b_dec

``W_enc [F, d]``, ``W_dec [d, F]``; ``b_dec`` is not subtracted from the input. The file does not say what k is: it is
in the name of the repository (``SAE-Res-Qwen3.5-2B-Base-W32K-L0_50``: 50), and is taken from there when the path shows
it. Without it only the code before the top-k is known, which is all that blocking uses. Source: the repositories'
README.
"""

import re
from pathlib import Path

from lockin_fast.sae.container import SparseAutoencoder
from lockin_fast.sae.normal_form import StoredWeights, to_normal_form
from lockin_fast.sae.options import ReadOptions, check_k, refuse_input_scale
from lockin_fast.sae.tensor_file import TensorFile

TENSORS = frozenset({"W_enc", "W_dec", "b_enc", "b_dec"})
SUFFIX = ".sae.pt"


def read_qwen_scope(path: Path, options: ReadOptions) -> SparseAutoencoder:
    """``path`` is the file of one layer, or a directory with one."""
    file = TensorFile(_layer_file(path) if path.is_dir() else path)
    refuse_input_scale(options, file.path, "Qwen-Scope reads the residual stream as it is")
    if options.fold_decoder_norm:
        raise ValueError(f"{file.path}: fold_decoder_norm=True would change which latents the top-k selects")
    width, d_model = file.shape("W_enc", 2)
    index = options.index(width)
    stored = StoredWeights(
        weight=file.rows("W_enc", (width, d_model), index),
        bias=file.vector("b_enc", width, index),
        decoder=file.columns("W_dec", (d_model, width), index),
        decoder_bias=file.vector("b_dec", d_model),
    )
    k = re.search(r"L0_(\d+)", str(file.path.absolute().parent))
    layer = re.fullmatch(r"layer(\d+)", file.path.name.removesuffix(SUFFIX))
    return to_normal_form(
        stored,
        activation="topk",
        k=check_k(int(k[1]), width, file.path) if k else None,
        latents=index,
        width=width,
        metadata={
            "format": "qwen_scope",
            "path": str(file.path),
            "architecture": "topk",
            "decoder_norm_folded": False,
            **({"hook_layer": int(layer[1])} if layer else {}),
        },
    )


def _layer_file(directory: Path) -> Path:
    found = sorted(entry for entry in directory.iterdir() if entry.name.endswith(SUFFIX))
    if len(found) != 1:
        raise ValueError(f"{directory}: expected one layerN{SUFFIX}, found {len(found)}; give the file of the layer")
    return found[0]
