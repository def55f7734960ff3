"""Fused kernels and thin trainers for latent blocking and lock-in measurement.

Importing the package needs torch alone: every public name is looked up when it is first used, so that transformers,
peft, triton and matplotlib are loaded only by the parts that need them. `import lockin_fast.ops` registers
`torch.ops.lockin_fast.*`.
"""

from importlib import import_module

__version__ = "0.1.0"

_EXPORTS = {
    "block_penalty": "lockin_fast.ops.block_penalty",
    "block_penalty_tap": "lockin_fast.ops.block_penalty_tap",
    "encode_latents": "lockin_fast.ops.encode_latents",
    "encode_topk": "lockin_fast.ops.encode_topk",
    "gradient_tap": "lockin_fast.ops.gradient_tap",
    "js_divergence": "lockin_fast.ops.js_divergence",
    "latent_stats": "lockin_fast.ops.latent_stats",
    "outlier_channels": "lockin_fast.ops.nf4_tensor",
    "patch_": "lockin_fast.ops.patch",
    "patch_diff": "lockin_fast.ops.patch_diff",
    "prefix_matching": "lockin_fast.ops.prefix_matching",
    "quantize_nf4": "lockin_fast.ops.nf4_tensor",
    "routing_stats": "lockin_fast.ops.routing_stats",
    "steer_": "lockin_fast.ops.steer",
    "Penalty": "lockin_fast.ops.block_penalty",
    "EncodedTopK": "lockin_fast.ops.encode_topk",
    "LatentStats": "lockin_fast.ops.latent_stats",
    "NF4Tensor": "lockin_fast.ops.nf4_tensor",
    "PatchDiff": "lockin_fast.ops.patch_diff",
    "RoutingStats": "lockin_fast.ops.routing_stats",
    "backends": "lockin_fast.dispatch",
    "load_sae": "lockin_fast.sae",
    "SparseAutoencoder": "lockin_fast.sae",
    "LatentSet": "lockin_fast.blocking",
    "BlockPenalty": "lockin_fast.blocking",
    "BlockTrainer": "lockin_fast.blocking",
    "KLPenalty": "lockin_fast.blocking",
    "PreventativeSteering": "lockin_fast.blocking",
    "ConceptAblation": "lockin_fast.blocking",
    "intervening": "lockin_fast.blocking",
    "LatentBlockMixin": "lockin_fast.blocking",
    "attach": "lockin_fast.blocking",
    "GradientInjection": "lockin_fast.blocking",
    "open_cache": "lockin_fast.cache",
    "CacheSource": "lockin_fast.blocking.write_cache",
    "write_hidden_states": "lockin_fast.blocking.write_cache",
    "write_latents": "lockin_fast.blocking.write_cache",
}

__all__ = list(_EXPORTS)


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_EXPORTS})
