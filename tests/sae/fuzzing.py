"""What the tests of damaged files share: copies of golden cases, changed tensors and settings, one clear line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lockin_fast.sae import load_sae

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS_FILE = {
    "saelens_jumprelu": "sae_weights.safetensors",
    "dl_batchtopk": "ae.pt",
    "goodfire_pth": "sae-l19.pth",
    "gemma_scope_1": "params.npz",
    "gemma_scope_1_compressed": "params.npz",
    "gemma_scope_2": "params.safetensors",
    "llama_scope": "checkpoints/final.safetensors",
    "qwen_scope_L0_7": "layer3.sae.pt",
    "sparsify_topk": "sae.safetensors",
}


def copy_of(case, folder):
    return Path(shutil.copytree(GOLDEN / case, folder / case))


def refuses(path, *words, error=ValueError, **options):
    with pytest.raises(error) as raised:
        load_sae(path, **options)
    message = str(raised.value)
    assert "\n" not in message, message
    for word in words:
        assert word in message, message
    return message


def edit_tensors(directory, **changes):
    """Replace tensors of the case's weights file; None removes one. Dots in names are written as double underscores."""
    file = next(directory / name for name in WEIGHTS_FILE.values() if (directory / name).exists())
    tensors = _load(file)
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors[name])
    if file.suffix == ".npz":
        np.savez(file, **{name: tensor.numpy() for name, tensor in tensors.items()})
    elif file.suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file)
    return file.name


def edit_config(directory, name="cfg.json", **changes):
    path = directory / name
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (config | changes).items() if value is not ...}))


def _load(file):
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            return {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in arrays}
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
