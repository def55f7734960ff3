"""Reader of dictionary_learning: ``ae.pt`` (a state dict) and ``config.json`` (which class wrote it).

    AutoEncoder             relu((x - bias) W^T + b)
    AutoEncoderNew          relu(x W^T + b)
    GatedAutoEncoder        u = (x - decoder_bias) W^T; (u + gate_bias > 0) * relu(exp(r_mag) u + mag_bias)
    JumpReluAutoEncoder     p = x W_enc + b_enc; relu(p) where p > threshold [F]
    AutoEncoderTopK         the k largest of p = relu((x - b_dec) W^T + b)
    BatchTopKSAE            the same p where p > threshold, a scalar; negative = never fitted = plain relu
    MatryoshkaBatchTopKSAE  as BatchTopKSAE, with W_enc and W_dec stored as parameters

A checkpoint ``{"ae": state dict, "norm_factor": n}`` written in mid-training expects x / n; it is brought back to the
model's own scale as the library does for its final file: biases and thresholds times n.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lockin_fast.sae.container import SparseAutoencoder
from lockin_fast.sae.normal_form import StoredWeights, to_normal_form, use_unit_decoder
from lockin_fast.sae.options import ReadOptions, check_k, read_json, refuse_input_scale
from lockin_fast.sae.tensor_file import TensorFile

WEIGHTS = "ae.pt"
CONFIG = "config.json"


@dataclass(frozen=True)
class Layout:
    """Where one of the library's classes keeps its tensors. A name ending in ``.weight`` is stored as torch.nn.Linear
    does ([out, in]); any other matrix the other way round."""

    activation: str
    encoder: str = "encoder.weight"
    bias: str = "encoder.bias"
    decoder: str = "decoder.weight"
    decoder_bias: str = "b_dec"
    subtracts_bias: bool = True
    folds_decoder_norm: bool = False


LAYOUTS = {
    "AutoEncoder": Layout("relu", decoder_bias="bias", folds_decoder_norm=True),
    "AutoEncoderNew": Layout("relu", decoder_bias="decoder.bias", subtracts_bias=False),
    "GatedAutoEncoder": Layout("gated", bias="mag_bias", decoder_bias="decoder_bias"),
    "JumpReluAutoEncoder": Layout("jumprelu", "W_enc", "b_enc", "W_dec", subtracts_bias=False),
    "AutoEncoderTopK": Layout("topk"),
    "BatchTopKSAE": Layout("batchtopk"),
    "MatryoshkaBatchTopKSAE": Layout("batchtopk", "W_enc", "b_enc", "W_dec"),
}


def read_dictionary_learning(path: Path, options: ReadOptions) -> SparseAutoencoder:
    """``path`` is the directory or its ``.pt`` file; ``config.json`` is looked for beside it, or one level above a
    ``checkpoints`` folder."""
    weights_path = path / WEIGHTS if path.is_dir() else path
    refuse_input_scale(options, weights_path, "the library brings its biases to the model's own scale")
    file = TensorFile(weights_path)
    prefix = "ae." if "ae.encoder.weight" in file or "ae.W_enc" in file else ""
    trainer = _trainer_config(weights_path)
    name = _class_name(trainer, file, prefix)
    layout = LAYOUTS[name]

    width, d_model = file.shape(prefix + layout.encoder, 2)
    if not layout.encoder.endswith(".weight"):
        width, d_model = d_model, width
    index = options.index(width)
    stored = StoredWeights(
        weight=_encoder_rows(file, prefix + layout.encoder, width, d_model, index),
        bias=file.vector(prefix + layout.bias, width, index),
        decoder=_decoder_rows(file, prefix + layout.decoder, width, d_model, index),
        decoder_bias=file.vector(prefix + layout.decoder_bias, d_model),
    )
    if layout.subtracts_bias:
        stored.input_bias = stored.decoder_bias
    if layout.activation == "gated":
        stored.row_scale = file.vector(prefix + "r_mag", width, index).double().exp()
        gate = file.vector(prefix + "gate_bias", width, index).double()
        stored.threshold = stored.bias.double() - stored.row_scale * gate
    elif layout.activation == "jumprelu":
        stored.threshold = file.vector(prefix + "threshold", width, index, infinite=True)
    elif layout.activation == "batchtopk":
        level = file.number(prefix + "threshold")
        stored.threshold = None if level < 0 else torch.full_like(stored.bias, level, dtype=torch.float64)

    folded = _fold_decoder_norm(stored, layout, options, weights_path)
    if prefix and "norm_factor" in file:
        _undo_activation_norm(stored, file.number("norm_factor"), weights_path)
    return to_normal_form(
        stored,
        activation=layout.activation,
        k=_k(trainer, file, prefix, width) if layout.activation in ("topk", "batchtopk") else None,
        latents=index,
        width=width,
        metadata=_metadata(trainer)
        | {
            "format": "dictionary_learning",
            "path": str(weights_path),
            "architecture": name,
            "decoder_norm_folded": folded,
        },
    )


def _trainer_config(weights_path: Path) -> dict:
    """The ``trainer`` part of config.json; empty when there is none."""
    for directory in (weights_path.parent, weights_path.parent.parent):
        path = directory / CONFIG
        if path.is_file() and (directory == weights_path.parent or weights_path.parent.name == "checkpoints"):
            trainer = read_json(path).get("trainer", {})
            if not isinstance(trainer, dict):
                raise ValueError(f"{path}: trainer must be an object, got {trainer!r}")
            return trainer | {"config": str(path)}
    return {}


def _class_name(trainer: dict, file: TensorFile, prefix: str) -> str:
    """The class that wrote the file: as the config says, otherwise by the tensors only that class has."""
    name = trainer.get("dict_class")
    if name is not None:
        if not isinstance(name, str) or name not in LAYOUTS:
            raise ValueError(
                f"{trainer['config']}: dict_class {name!r} is not supported; expected {', '.join(LAYOUTS)}"
            )
        return name
    marks = {
        "AutoEncoder": ("bias",),
        "AutoEncoderNew": ("encoder.bias", "decoder.bias"),
        "GatedAutoEncoder": ("gate_bias",),
        "MatryoshkaBatchTopKSAE": ("group_sizes",),
    }
    for candidate, tensors in marks.items():
        if all(prefix + tensor in file for tensor in tensors):
            return candidate
    if prefix + "W_enc" in file and prefix + "threshold" in file:
        return "JumpReluAutoEncoder"
    if prefix + "k" in file:
        raise ValueError(
            f"{file.path}: AutoEncoderTopK and BatchTopKSAE store the same tensors; put the {CONFIG} that was saved "
            "with the SAE beside the file"
        )
    raise ValueError(f"{file.path}: not a dictionary_learning SAE; the file has {', '.join(sorted(file.shapes)[:12])}")


def _encoder_rows(file: TensorFile, name: str, width: int, d_model: int, index: Tensor | None) -> Tensor:
    if name.endswith(".weight"):
        return file.rows(name, (width, d_model), index)
    return file.columns(name, (d_model, width), index)


def _decoder_rows(file: TensorFile, name: str, width: int, d_model: int, index: Tensor | None) -> Tensor:
    if name.endswith(".weight"):
        return file.columns(name, (d_model, width), index)
    return file.rows(name, (width, d_model), index)


def _fold_decoder_norm(stored: StoredWeights, layout: Layout, options: ReadOptions, path: Path) -> bool:
    folded = layout.folds_decoder_norm if options.fold_decoder_norm is None else options.fold_decoder_norm
    if folded and layout.activation == "topk":
        raise ValueError(f"{path}: fold_decoder_norm=True would change which latents the top-k selects")
    if folded:
        use_unit_decoder(stored)
    return folded


def _undo_activation_norm(stored: StoredWeights, factor: float, path: Path) -> None:
    """x / n in, n z out: the rows stay as they are, every bias and threshold grows by n."""
    if not 0 < factor < float("inf"):
        raise ValueError(f"{path}: norm_factor must be positive and finite, got {factor}")
    # In fp64, so that the one rounding is that of the normal form.
    stored.bias = stored.bias.double() * factor
    stored.decoder_bias = stored.decoder_bias.double() * factor
    if stored.input_bias is not None:
        stored.input_bias = stored.decoder_bias
    if stored.threshold is not None:
        stored.threshold = stored.threshold.double() * factor


def _k(trainer: dict, file: TensorFile, prefix: str, width: int) -> int:
    in_file = file.number(prefix + "k") if prefix + "k" in file else None
    in_config = trainer.get("k")
    if in_file is not None and in_config is not None and in_file != in_config:
        raise ValueError(f"{file.path}: k is {in_file:g} here but {in_config} in {trainer['config']}")
    k = in_config if in_file is None else in_file
    return check_k(k, width, file.path)


def _metadata(trainer: dict) -> dict:
    kept = {key: value for key, value in trainer.items() if key != "config" and isinstance(value, (str, int, float))}
    renamed = {"layer": "hook_layer", "lm_name": "model_name", "submodule_name": "hook_name"}
    return {renamed.get(key, key): value for key, value in kept.items()}
