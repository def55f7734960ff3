"""Reader of SAELens directories: ``cfg.json`` and ``sae_weights.safetensors``, of every version since 2.

Encoder ``W_enc [d, F]``, decoder ``W_dec [F, d]``. With N the activation norm, a = ``apply_b_dec_to_input``:

    standard   relu((N(x) - a b_dec) W_enc + b_enc)
    jumprelu   the same, kept where the pre-activation exceeds ``threshold [F]``
    batchtopk  a training checkpoint: jumprelu at the scalar ``topk_threshold``
    topk       the k largest, then relu
    gated      (u + b_gate > 0) * relu(u exp(r_mag) + b_mag), u = (N(x) - a b_dec) W_enc

``rescale_acts_by_decoder_norm`` (topk, batchtopk) multiplies pre-activations by the norm of the decoder row and the
decoder row by its inverse.
"""

from pathlib import Path

import torch
from torch import Tensor

from lockin_fast.sae.container import NORMALIZATIONS, SparseAutoencoder
from lockin_fast.sae.normal_form import StoredWeights, to_normal_form, use_unit_decoder
from lockin_fast.sae.options import ReadOptions, check_k, read_json, refuse_input_scale
from lockin_fast.sae.tensor_file import TensorFile

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
ACTIVATION_OF = {
    "standard": "relu",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "topk": "topk",
    "batchtopk": "batchtopk",
}


def read_saelens(path: Path, options: ReadOptions) -> SparseAutoencoder:
    """``path`` is the directory or either of its two files."""
    directory = path if path.is_dir() else path.parent
    config_path = directory / CONFIG
    config = _modernised(read_json(config_path), config_path)
    architecture = config["architecture"]
    file = TensorFile(directory / WEIGHTS)

    d_model, width = file.shape("W_enc", 2)
    for field, size in (("d_in", d_model), ("d_sae", width)):
        if config.get(field) != size:
            raise ValueError(f"{config_path}: {field} is {config.get(field)!r}, but W_enc in {WEIGHTS} has {size}")
    index = options.index(width)
    stored = StoredWeights(
        weight=file.columns("W_enc", (d_model, width), index),
        bias=file.vector("b_mag" if architecture == "gated" else "b_enc", width, index),
        decoder=file.rows("W_dec", (width, d_model), index),
        decoder_bias=file.vector("b_dec", d_model),
    )
    if config["apply_b_dec_to_input"]:
        stored.input_bias = stored.decoder_bias
    if architecture == "gated":
        _set_gate(stored, file, width, index)
    if architecture == "jumprelu":
        stored.threshold = file.vector("threshold", width, index, infinite=True)
    if config["normalize_activations"] == "expected_average_only_in":
        stored.input_scale = _input_scale(options, config_path)
    else:
        refuse_input_scale(options, config_path, f"normalize_activations is {config['normalize_activations']!r}")
    folded = _fold_decoder_norm(stored, config, options, config_path)
    if architecture == "batchtopk":
        # Set after the fold: the library compares after rescaling by the decoder norm, where there is one.
        stored.threshold = torch.full_like(stored.bias, file.number("topk_threshold"), dtype=torch.float64)
    _fold_finetuning_scale(stored, file, width, index, config)
    return to_normal_form(
        stored,
        activation=ACTIVATION_OF[architecture],
        k=check_k(config.get("k"), width, config_path) if architecture in ("topk", "batchtopk") else None,
        latents=index,
        width=width,
        normalization=config["normalize_activations"] if config["normalize_activations"] in NORMALIZATIONS else "none",
        metadata=_metadata(config) | {"path": str(directory), "decoder_norm_folded": folded},
    )


def _modernised(config: dict, path: Path) -> dict:
    """Old flat configs in the words of the new ones, with every default filled in and every value checked."""
    renamed = {"hook_point": "hook_name", "hook_point_layer": "hook_layer", "activation_fn_str": "activation_fn"}
    config = {renamed.get(key, key): value for key, value in config.items()}
    activation = config.get("activation_fn") or "relu"
    arguments = config.get("activation_fn_kwargs") or {}
    if activation == "topk" and isinstance(arguments, dict):
        config |= {"architecture": "topk", "k": arguments.get("k", config.get("k"))}
    elif activation != "relu":
        raise ValueError(f"{path}: activation_fn {activation!r} is not supported; expected 'relu' or 'topk'")
    normalize = config.get("normalize_activations")
    if isinstance(normalize, bool) or normalize is None:
        config["normalize_activations"] = "expected_average_only_in" if normalize else "none"
    defaults = {"architecture": "standard", "apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": False}
    config = defaults | config

    if not isinstance(config["architecture"], str) or config["architecture"] not in ACTIVATION_OF:
        raise ValueError(
            f"{path}: architecture {config['architecture']!r} is not supported; expected {', '.join(ACTIVATION_OF)}"
        )
    known = (*NORMALIZATIONS, "expected_average_only_in")
    if config["normalize_activations"] not in known:
        raise ValueError(
            f"{path}: normalize_activations {config['normalize_activations']!r} is not supported; "
            f"expected {', '.join(known)}"
        )
    for field in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"):
        if not isinstance(config[field], bool):
            raise ValueError(f"{path}: {field} must be true or false, got {config[field]!r}")
    return config


def _set_gate(stored: StoredWeights, file: TensorFile, width: int, index: Tensor | None) -> None:
    """u + b_gate > 0 in terms of the magnitude's pre-activation m = u exp(r) + b_mag: m > b_mag - b_gate exp(r)."""
    stored.row_scale = file.vector("r_mag", width, index).double().exp()
    gate = file.vector("b_gate", width, index).double()
    stored.threshold = stored.bias.double() - stored.row_scale * gate


def _input_scale(options: ReadOptions, path: Path) -> float:
    if options.input_scale is None:
        raise ValueError(
            f"{path}: normalize_activations is 'expected_average_only_in', whose scalar is not in the checkpoint; "
            "pass input_scale = sqrt(d) / mean norm of the activations (1.0 if it is folded into the weights already)"
        )
    return options.input_scale


def _fold_decoder_norm(stored: StoredWeights, config: dict, options: ReadOptions, path: Path) -> bool:
    """Whether z comes out in units of unit decoder rows."""
    rescaled = config["rescale_acts_by_decoder_norm"] and config["architecture"] in ("topk", "batchtopk")
    folded = rescaled if options.fold_decoder_norm is None else options.fold_decoder_norm
    if config["architecture"] in ("topk", "batchtopk") and folded != rescaled:
        raise ValueError(
            f"{path}: fold_decoder_norm={folded} would change which latents the top-k selects "
            f"(rescale_acts_by_decoder_norm is {rescaled})"
        )
    if folded:
        use_unit_decoder(stored)
    return folded


def _fold_finetuning_scale(
    stored: StoredWeights, file: TensorFile, width: int, index: Tensor | None, config: dict
) -> None:
    """Versions before 6 could store a per-latent factor that multiplies z in the decoder only."""
    if "scaling_factor" not in file:
        return
    factor = file.vector("scaling_factor", width, index)
    if bool((factor != 1).any()):
        if not config.get("finetuning_scaling_factor"):
            raise ValueError(
                f"{file.path}: scaling_factor is stored, but finetuning_scaling_factor is not set in {CONFIG}"
            )
        stored.decoder = (stored.decoder.double() * factor.double()[:, None]).to(stored.decoder.dtype)


def _metadata(config: dict) -> dict:
    nested = config.get("metadata") if isinstance(config.get("metadata"), dict) else {}
    flat = {key: value for key, value in config.items() if key != "metadata" and isinstance(value, (str, int, float))}
    return flat | nested | {"format": "saelens"}
