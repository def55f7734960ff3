"""Reader of Gemma Scope 1 (``params.npz``) and 2 (``config.json`` and ``params.safetensors``): JumpReLU.

    p = x w_enc + b_enc;  z = relu(p) where p > threshold [F];  x' = z w_dec + b_dec

``w_enc [d, F]`` and ``w_dec [F, d]``; the first release writes them with a capital W. ``b_dec`` is not subtracted from
the input. Of Gemma Scope 2's other coders, transcoders are read as far as they have this form (``decode`` then gives
the MLP's output), those with an affine skip, cross-layer transcoders and crosscoders are refused.
Source: google/gemma-scope on the Hugging Face hub, arXiv 2408.05147.
"""

from pathlib import Path

from lockin_fast.sae.container import SparseAutoencoder
from lockin_fast.sae.normal_form import StoredWeights, to_normal_form, use_unit_decoder
from lockin_fast.sae.options import ReadOptions, read_json, refuse_input_scale
from lockin_fast.sae.tensor_file import TensorFile

ARCHIVE = "params.npz"
WEIGHTS = "params.safetensors"
CONFIG = "config.json"
CODERS = ("sae", "transcoder")


def read_gemma_scope(path: Path, options: ReadOptions) -> SparseAutoencoder:
    """``path`` is the directory or its file of parameters. ``config.json`` is optional; what it says is checked."""
    directory = path if path.is_dir() else path.parent
    if path.is_dir() or path.name == CONFIG:
        path = directory / (ARCHIVE if (directory / ARCHIVE).exists() else WEIGHTS)
    refuse_input_scale(options, path, "Gemma Scope reads the residual stream as it is")
    if path.name == ARCHIVE and "embedding" in directory.parts:
        raise ValueError(f"{path}: an SAE of the embeddings, which no layer puts out; take one under layer_N")
    file = TensorFile(path)
    encoder, decoder = (f"{'W' if f'W_{part}' in file else 'w'}_{part}" for part in ("enc", "dec"))
    d_model, width = file.shape(encoder, 2)
    config = {} if path.name == ARCHIVE or not (directory / CONFIG).exists() else read_json(directory / CONFIG)
    _check_config(config, directory / CONFIG, width)
    _check_extras(file)

    index = options.index(width)
    stored = StoredWeights(
        weight=file.columns(encoder, (d_model, width), index),
        bias=file.vector("b_enc", width, index),
        decoder=file.rows(decoder, (width, d_model), index),
        decoder_bias=file.vector("b_dec", d_model),
        threshold=file.vector("threshold", width, index, infinite=True),
    )
    if options.fold_decoder_norm:
        use_unit_decoder(stored)
    described = {key: value for key, value in config.items() if isinstance(value, (str, int, float))}
    return to_normal_form(
        stored,
        activation="jumprelu",
        latents=index,
        width=width,
        metadata=described
        | {
            "format": "gemma_scope",
            "path": str(path),
            "architecture": "jumprelu",
            "decoder_norm_folded": bool(options.fold_decoder_norm),
        },
    )


def _check_config(config: dict, path: Path, width: int) -> None:
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise ValueError(f"{path}: architecture {config['architecture']!r} is not supported; expected 'jump_relu'")
    if config.get("type", "sae") not in CODERS:
        raise ValueError(f"{path}: type {config['type']!r} is not supported; expected {' or '.join(CODERS)}")
    if config.get("width", width) != width:
        raise ValueError(f"{path}: width is {config['width']!r}, but the encoder in {WEIGHTS} has {width}")
    if config.get("affine_connection"):
        raise ValueError(f"{path}: affine_connection is set; a transcoder with a skip has no place to put it here")


def _check_extras(file: TensorFile) -> None:
    """Tensors beside the five would change what the SAE computes."""
    if "affine_skip_connection" in file:
        raise ValueError(f"{file.path}: affine_skip_connection is stored; transcoders with a skip are not supported")
    if "scaling_factor" in file:
        factor = file.vector("scaling_factor", file.shapes["scaling_factor"][0])
        if bool((factor != 1).any()):
            raise ValueError(f"{file.path}: scaling_factor other than 1 is stored, which this format gives no meaning")
