"""Which files make an SAE of which format: what a folder is recognised by, and what of it must be downloaded."""

from pathlib import PurePath
from typing import Literal

Format = Literal[
    "saelens", "dictionary_learning", "goodfire", "gemma_scope", "llama_scope", "llama_scope_openmoss", "sparsify",
    "qwen_scope",
]  # fmt: skip
PICKLES = (".pt", ".pth")
# The weights that a format is recognised by, and what else it reads, by the names in the SAE's folder.
WEIGHTS = {
    "saelens": ("sae_weights.safetensors",),
    "dictionary_learning": ("ae.pt",),
    "gemma_scope": ("params.npz", "params.safetensors"),
    "llama_scope": ("checkpoints/final.safetensors",),
    "sparsify": ("sae.safetensors",),
}
CONFIGS = {
    "saelens": ("cfg.json",),
    "dictionary_learning": ("config.json",),
    "gemma_scope": ("config.json",),
    "llama_scope": ("hyperparams.json",),
    "sparsify": ("cfg.json",),
}
EXPECTED = (
    "saelens (cfg.json + sae_weights.safetensors), dictionary_learning (ae.pt + config.json), "
    "gemma_scope (params.npz or config.json + params.safetensors), "
    "llama_scope (hyperparams.json + checkpoints/final.safetensors), sparsify (cfg.json + sae.safetensors), "
    "qwen_scope (one layerN.sae.pt), goodfire (one .pth or .pt)"
)


def formats_in(names: set[str]) -> list[str]:
    """The formats whose weights are among `names`, the files of a folder as seen from it."""
    return [format for format, weights in WEIGHTS.items() if names.intersection(weights)]


def lone_pickles(names: set[str]) -> list[str]:
    """Pickles directly in a folder that no format names: Goodfire's and Qwen-Scope's are known by their tensors."""
    named = {weights for of_format in WEIGHTS.values() for weights in of_format}
    return sorted(name for name in names - named if "/" not in name and PurePath(name).suffix in PICKLES)
