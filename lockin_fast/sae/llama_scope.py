"""Reader of Llama Scope: ``hyperparams.json`` and ``checkpoints/final.safetensors``. JumpReLU, one threshold t for all.

``encoder.weight [F, d]`` and ``decoder.weight [d, F]`` as ``torch.nn.Linear`` stores them, trained on activations
scaled by s = sqrt(d) / ``dataset_average_activation_norm``. With n the norm of a latent's decoder row D, there are two
published readings, which differ in the latent's unit by n / s and in the gate by n:

    SAELens     p = s x W^T + b           z = relu(p) where p > s t;   x' = (z D + c) / s
    OpenMOSS    p = n (x W^T + b / s)     z = relu(p) where p > t;     x' = z D / n + c / s

SAELens' is the default of :func:`load_sae`; ``format="llama_scope_openmoss"`` takes the authors'.
``metadata["reading"]`` says which. Sources: the loader of SAELens 6; OpenMOSS/Language-Model-SAEs, arXiv 2410.20526.
"""

import math
from pathlib import Path

import torch

from lockin_fast.sae.container import SparseAutoencoder
from lockin_fast.sae.normal_form import StoredWeights, row_norms, to_normal_form, use_unit_decoder
from lockin_fast.sae.options import ReadOptions, read_json, refuse_input_scale
from lockin_fast.sae.tensor_file import TensorFile

CONFIG = "hyperparams.json"
WEIGHTS = Path("checkpoints") / "final.safetensors"
SETTINGS = {  # what the arithmetic above takes for granted
    "act_fn": "jumprelu",
    "norm_activation": "dataset-wise",
    "apply_decoder_bias_to_pre_encoder": False,
    "use_decoder_bias": True,
    "use_glu_encoder": False,
}


def read_llama_scope(path: Path, options: ReadOptions) -> SparseAutoencoder:
    """SAELens' reading. ``path`` is the directory or either of its two files."""
    return _read(path, options, "saelens")


def read_llama_scope_openmoss(path: Path, options: ReadOptions) -> SparseAutoencoder:
    """The authors' reading: z in the stream's own scale, in units of unit decoder rows."""
    return _read(path, options, "openmoss")


def _read(path: Path, options: ReadOptions, reading: str) -> SparseAutoencoder:
    if not path.is_dir():
        path = path.parent.parent if path.parent.name == WEIGHTS.parent.name else path.parent
    config_path = path / CONFIG
    refuse_input_scale(options, config_path, f"the scale is in {CONFIG}")
    config = read_json(config_path)
    file = TensorFile(path / WEIGHTS)
    width, d_model = file.shape("encoder.weight", 2)
    for field, size in (("d_model", d_model), ("d_sae", width)):
        if config.get(field) != size:
            said = f"{field} is {config.get(field)!r}"
            raise ValueError(f"{config_path}: {said}, but encoder.weight in {WEIGHTS} has {size}")
    for field, expected in SETTINGS.items():
        if config.get(field, expected) != expected:
            raise ValueError(f"{config_path}: {field} is {config[field]!r}; only {expected!r} is supported")
    scale = math.sqrt(d_model) / _average_norm(config, config_path)
    threshold = _positive(config.get("jump_relu_threshold"), "jump_relu_threshold", config_path)

    index = options.index(width)
    stored = StoredWeights(
        weight=file.rows("encoder.weight", (width, d_model), index),
        bias=file.vector("encoder.bias", width, index),
        decoder=file.columns("decoder.weight", (d_model, width), index),
        decoder_bias=file.vector("decoder.bias", d_model),
        input_scale=scale,
    )
    if reading == "saelens":
        stored.threshold = torch.full_like(stored.bias, threshold * scale, dtype=torch.float64)
        folded = bool(options.fold_decoder_norm)
        if folded:
            use_unit_decoder(stored)
    else:
        if options.fold_decoder_norm is False:
            raise ValueError(f"{path}: fold_decoder_norm=False contradicts OpenMOSS' reading; take llama_scope")
        folded = True
        stored.latent_scale = row_norms(stored.decoder) / scale
        stored.threshold = torch.full_like(stored.bias, threshold, dtype=torch.float64)
    return to_normal_form(
        stored,
        activation="jumprelu",
        latents=index,
        width=width,
        metadata={key: value for key, value in config.items() if isinstance(value, (str, int, float))}
        | {
            "format": "llama_scope",
            "reading": reading,
            "path": str(path),
            "architecture": "jumprelu",
            "hook_name": config.get("hook_point_in"),
            "decoder_norm_folded": folded,
        },
    )


def _average_norm(config: dict, path: Path) -> float:
    norms = config.get("dataset_average_activation_norm")
    if not isinstance(norms, dict):
        raise ValueError(f"{path}: dataset_average_activation_norm must hold 'in' and 'out', got {norms!r}")
    average = _positive(norms.get("in"), "dataset_average_activation_norm.in", path)
    if norms.get("out", average) != average:
        raise ValueError(
            f"{path}: the norms in and out of dataset_average_activation_norm differ ({average} and {norms['out']!r}): "
            "a transcoder, which is not supported"
        )
    return average


def _positive(value, field: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{path}: {field} must be a number above 0, got {value!r}")
    return float(value)
