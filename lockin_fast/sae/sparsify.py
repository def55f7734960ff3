"""Reader of EleutherAI's sparsify: ``cfg.json`` and ``sae.safetensors``.

    p = relu((x - b_dec) encoder.weight^T + encoder.bias);  z = the k largest of p;  x' = z W_dec + b_dec

``encoder.weight`` and ``W_dec`` are both [F, d]. With ``transcode`` nothing is subtracted; x' is a module's output.
``activation: groupmax`` keeps the largest of each of k groups of neighbouring latents instead of the k largest.
``num_latents`` 0 means ``expansion_factor`` times d. Source: the library itself; SAELens reads these files wrongly.
"""

from pathlib import Path

from lockin_fast.sae.container import SparseAutoencoder
from lockin_fast.sae.normal_form import StoredWeights, to_normal_form
from lockin_fast.sae.options import ReadOptions, check_k, read_json, refuse_input_scale
from lockin_fast.sae.tensor_file import TensorFile

CONFIG = "cfg.json"
WEIGHTS = "sae.safetensors"
ACTIVATIONS = ("topk", "groupmax")


def read_sparsify(path: Path, options: ReadOptions) -> SparseAutoencoder:
    """``path`` is the directory or either of its two files."""
    directory = path if path.is_dir() else path.parent
    config_path = directory / CONFIG
    refuse_input_scale(options, config_path, "sparsify reads activations as they are")
    config = read_json(config_path)
    file = TensorFile(directory / WEIGHTS)
    width, d_model = file.shape("encoder.weight", 2)
    activation = _check_config(config, config_path, width, d_model)
    if options.fold_decoder_norm:
        raise ValueError(f"{directory}: fold_decoder_norm=True would change which latents the {activation} selects")

    index = options.index(width)
    stored = StoredWeights(
        weight=file.rows("encoder.weight", (width, d_model), index),
        bias=file.vector("encoder.bias", width, index),
        decoder=file.rows("W_dec", (width, d_model), index),
        decoder_bias=file.vector("b_dec", d_model),
    )
    if not config.get("transcode"):
        stored.input_bias = stored.decoder_bias
    return to_normal_form(
        stored,
        activation=activation,
        k=check_k(config.get("k"), width, config_path),
        latents=index,
        width=width,
        metadata={key: value for key, value in config.items() if isinstance(value, (str, int, float))}
        | {"format": "sparsify", "path": str(directory), "architecture": activation, "decoder_norm_folded": False},
    )


def _check_config(config: dict, path: Path, width: int, d_model: int) -> str:
    """The activation, once everything the file says of itself agrees with its tensors."""
    if config.get("d_in") != d_model:
        raise ValueError(f"{path}: d_in is {config.get('d_in')!r}, but encoder.weight in {WEIGHTS} has {d_model}")
    latents, factor = config.get("num_latents", 0), config.get("expansion_factor", 32)
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in (latents, factor)):
        raise ValueError(f"{path}: num_latents and expansion_factor must be integers, got {latents!r} and {factor!r}")
    if (latents or factor * d_model) != width:
        said = f"num_latents is {latents}" if latents else f"expansion_factor {factor} times d_in is {factor * d_model}"
        raise ValueError(f"{path}: {said}, but encoder.weight in {WEIGHTS} has {width} latents")
    for field in ("skip_connection", "signed"):
        if config.get(field):
            raise ValueError(f"{path}: {field} is set, which is not supported")
    activation = config.get("activation", "topk")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{path}: activation {activation!r} is not supported; expected {' or '.join(ACTIVATIONS)}")
    if activation == "groupmax" and width % check_k(config.get("k"), width, path):
        raise ValueError(f"{path}: groupmax needs k to divide the {width} latents, got k={config['k']!r}")
    return activation
