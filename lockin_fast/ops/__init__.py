"""The ops: one file each, with what it computes, its schema, its gradient and its public function."""

from lockin_fast import dispatch
from lockin_fast.ops import (
    block_penalty,
    block_penalty_nf4,
    block_penalty_tap,
    encode_latents,
    encode_topk,
    js_divergence,
    latent_backward,
    latent_stats,
    nf4,
    nf4_tensor,
    patch,
    patch_diff,
    prefix_matching,
    routing_stats,
    segment_stats,
    steer,
)

dispatch.activate()

__all__ = [
    "block_penalty",
    "block_penalty_nf4",
    "block_penalty_tap",
    "encode_latents",
    "encode_topk",
    "js_divergence",
    "latent_backward",
    "latent_stats",
    "nf4",
    "nf4_tensor",
    "patch",
    "patch_diff",
    "prefix_matching",
    "routing_stats",
    "segment_stats",
    "steer",
]
