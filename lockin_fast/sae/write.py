"""Writer of SAELens directories that the current SAELens loads."""

import json
import os
import shutil
import tempfile
from pathlib import Path

from torch import Tensor

from lockin_fast.sae.container import SparseAutoencoder
from lockin_fast.sae.saelens import CONFIG, WEIGHTS

# The layout of cfg.json (nested metadata) that version 6 introduced; older numbers make SAELens read it as flat.
LAYOUT_VERSION = "6.0.0"
REQUIRED_METADATA = ("hook_name", "hook_layer", "model_name")


def save_saelens(
    path: str | Path,
    *,
    weight: Tensor,
    bias: Tensor,
    decoder: Tensor,
    decoder_bias: Tensor,
    architecture: str = "standard",
    threshold: Tensor | None = None,
    k: int | None = None,
    **metadata,
) -> Path:
    """Write encoder rows ``weight [F, d]``, ``bias [F]``, ``decoder [F, d]``, ``decoder_bias [d]`` as an SAELens SAE.

    The encoder is z = relu(x weight^T + bias): nothing is subtracted from the input (``apply_b_dec_to_input`` false).
    ``architecture``: ``standard``; ``jumprelu``, with ``threshold [F]``; ``topk``, with ``k``. ``metadata`` must name
    ``hook_name`` ("blocks.19.hook_resid_post"), ``hook_layer`` (19) and ``model_name``; more JSON values are kept.

    Returns the directory. It appears whole or not at all. Raises FileExistsError when ``path`` exists, ValueError for
    inconsistent tensors, OSError when the disk does not take them.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path}: exists already; SAEs are never overwritten, choose another directory")
    missing = [name for name in REQUIRED_METADATA if metadata.get(name) is None]
    if missing:
        raise ValueError(f"save_saelens needs {', '.join(missing)}, to say which stream the SAE reads")
    activations = {"standard": "relu", "jumprelu": "jumprelu", "topk": "topk"}
    if architecture not in activations:
        raise ValueError(f"architecture must be one of {', '.join(activations)}, got {architecture!r}")
    if architecture == "topk" and k is None:
        raise ValueError("architecture='topk' needs k")
    sae = SparseAutoencoder(
        weight=weight.detach(),
        bias=bias.detach().float(),
        decoder=decoder.detach(),
        decoder_bias=decoder_bias.detach(),
        threshold=None if threshold is None else threshold.detach().float(),
        activation=activations[architecture],
        k=k,
    )
    config = json.dumps(_config(sae, architecture, metadata), indent=2)
    _write_directory(path, config, _tensors(sae))
    return path


def _config(sae: SparseAutoencoder, architecture: str, metadata: dict) -> dict:
    return {
        "architecture": architecture,
        "d_in": sae.d_model,
        "d_sae": sae.width,
        "dtype": str(sae.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **({"k": sae.k, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}),
        "metadata": {"sae_lens_version": LAYOUT_VERSION, **metadata},
    }


def _tensors(sae: SparseAutoencoder) -> dict[str, Tensor]:
    tensors = {
        "W_enc": sae.weight.T,
        "b_enc": sae.bias,
        "W_dec": sae.decoder,
        "b_dec": sae.decoder_bias,
        **({} if sae.threshold is None else {"threshold": sae.threshold}),
    }
    # safetensors refuses views and tensors that share memory.
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _write_directory(path: Path, config: str, tensors: dict[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        (temporary / CONFIG).write_text(config + "\n", encoding="utf-8")
        save_file(tensors, temporary / WEIGHTS)
        for name in (CONFIG, WEIGHTS):
            with open(temporary / name, "rb") as file:
                os.fsync(file.fileno())
        temporary.chmod(0o755)
        os.rename(temporary, path)
    except SafetensorError as error:
        raise OSError(f"{path}: could not be written ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
