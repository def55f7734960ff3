"""Latent blocking: which latents, what they are penalised against, and the trainer that applies it.

The latent sets and the penalty need torch alone; transformers loads with the trainer.
"""

from importlib import import_module

_EXPORTS = {
    "LatentSet": "latents",
    "BlockPenalty": "penalty",
    "BlockTrainer": "trainer",
    "ConceptAblation": "interventions",
    "KLPenalty": "kl",
    "LatentBlockMixin": "mixin",
    "PreventativeSteering": "interventions",
    "attach": "mixin",
    "GradientInjection": "inject",
    "intervening": "interventions",
}

__all__ = list(_EXPORTS)


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value
