"""Stage 3: the group of latents that repairs the misaligned model together.

Single latents overlap: twenty that each repair well alone may all carry the same part. So the group is built one latent
at a time, each the one that repairs most on top of those already chosen, and what is measured is what blocking does:
the latent is held at the base model's side.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lockin_fast.blocking.layers import decoder_layer
from lockin_fast.blocking.reference import Reference
from lockin_fast.discovery.reply_scores import Contrast, reply_log_probs, tokenised_contrasts
from lockin_fast.ops.encode_latents import encode_latents
from lockin_fast.sae import SparseAutoencoder

RECONSIDERED = 12  # candidates measured again in a round, the most promising by their last measurement


@torch.no_grad()
def joint_repair(
    adapted: Any,
    tokenizer: Any,
    contrasts: Sequence[Contrast],
    sae: SparseAutoencoder,
    signs: Tensor,
    *,
    layer: int,
    count: int,
    batch_size: int,
    step_done: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[int, float]]:
    """Choose `count` of the SAE's rows [P] by greedy forward selection; return (row, gain) in the order chosen.

    contrasts: (prompt messages, misaligned reply, aligned reply). Holding the chosen set S at the base's side replaces
    the residual stream of the PEFT model `adapted` at `layer`'s output, at every position, by
        h - sum_{k in S} s_k relu(s_k (z_k - z_k(base))) decoder_k,
    and the misalignment left is mean(log p(misaligned reply) - log p(aligned reply)) in nats; gain is by how much a row
    lowers it on top of those before. signs: s_k [P], +1 where the fine-tune raised the latent, -1 where it lowered it.
    Costs about (P + RECONSIDERED * count) * 2 * len(contrasts) forward rows and generates nothing.
    """
    ids, attention, in_reply = tokenised_contrasts(tokenizer, contrasts, next(adapted.parameters()).device)
    tuned, base = Reference(adapted, layer, adapters=False), Reference(adapted, layer, adapters=True)
    h, h_base = (_hidden_states(stream, ids, attention, batch_size) for stream in (tuned, base))  # [R, S, d]
    z, z_base = (encode_latents(stream, sae.weight, sae.bias) for stream in (h, h_base))
    signs = signs.to(z)
    excess = (signs * F.relu(signs * (z - z_base))).to(h.dtype)  # [R, S, P]
    decoder = sae.decoder.to(h)
    module = decoder_layer(adapted, layer)

    def left(row: int | None, held: Tensor) -> float:
        """Misalignment left with `row` held as well."""
        changed = held if row is None else held - excess[..., row, None] * decoder[row]
        scores = []
        for start in range(0, len(ids), batch_size):
            part = slice(start, start + batch_size)
            with _output_replaced(module, changed[part]):
                scores.append(reply_log_probs(adapted, ids[part], attention[part], in_reply[part]))
        misaligned, aligned = torch.cat(scores).view(2, -1)
        return (misaligned - aligned).mean().item()

    now, held, chosen = left(None, h), h, []
    promise = {row: float("inf") for row in range(len(signs))}  # last measured gain
    for step in range(min(count, len(promise))):
        measured = {}
        for row in sorted(promise, key=lambda row: -promise[row])[: len(promise) if step == 0 else RECONSIDERED]:
            measured[row] = promise[row] = now - left(row, held)
        best = max(measured, key=lambda row: (measured[row], -row))
        held = held - excess[..., best, None] * decoder[best]
        now -= measured[best]
        chosen.append((best, promise.pop(best)))
        step_done(step + 1, count)
    return chosen


def _hidden_states(stream: Reference, ids: Tensor, attention: Tensor, batch_size: int) -> Tensor:
    batches = zip(ids.split(batch_size), attention.split(batch_size), strict=True)
    return torch.cat([stream.hidden_state((), {"input_ids": i, "attention_mask": a}) for i, a in batches])


@contextmanager
def _output_replaced(module: nn.Module, hidden: Tensor):
    handle = module.register_forward_hook(
        lambda module, inputs, output: (hidden, *output[1:]) if isinstance(output, tuple) else hidden
    )
    try:
        yield
    finally:
        handle.remove()
