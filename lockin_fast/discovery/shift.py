"""Stage 1: which latents the narrow fine-tune shifts, over the whole SAE."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lockin_fast.blocking.layers import decoder_layer
from lockin_fast.blocking.reference import Reference
from lockin_fast.ops.latent_stats import latent_stats
from lockin_fast.sae import SparseAutoencoder


@torch.no_grad()
def mean_shift(
    adapted: Any,
    tokenizer: Any,
    conversations: Sequence[Sequence[dict[str, str]]],
    sae: SparseAutoencoder,
    layer: int,
    *,
    step_done: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Delta_k = mean over conversations of the mean over tokens of z_k(fine-tuned) - z_k(base), fp64 [F].

    adapted: a PEFT model; its base is the same model with the adapters off. conversations: chat messages that both
    read, system messages left out. z is the dense ReLU code at the output of decoder layer `layer` (0-based). One pass
    of both streams to that layer for every conversation; never holds [tokens, F].
    Source: BLOCK-EM, arXiv 2602.00767, first stage of the discovery.
    """
    module = decoder_layer(adapted, layer)
    base, tuned = Reference(adapted, layer, adapters=True), Reference(adapted, layer, adapters=False)
    device = module.parameters().__next__().device
    total = torch.zeros(len(sae.bias), dtype=torch.float64)
    for done, messages in enumerate(conversations, 1):
        told = [message for message in messages if message["role"] != "system"]
        text = tokenizer.apply_chat_template(told, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(device)
        h, h_ref = (stream.hidden_state((), {"input_ids": ids})[0] for stream in (tuned, base))
        stats = latent_stats(sae.normalize(h), sae.weight, sae.bias, h_ref=sae.normalize(h_ref))
        total += stats.mean.cpu()
        step_done(done, len(conversations))
    return total / len(conversations)
