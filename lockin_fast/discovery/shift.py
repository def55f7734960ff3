"""Stage 1: which latents the narrow fine-tune shifts, over the whole SAE, of one or of several layers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lockin_fast.blocking.layers import decoder_layer, hidden_size
from lockin_fast.blocking.reference import Reference
from lockin_fast.discovery.shift_store import ShiftStore
from lockin_fast.discovery.shift_sums import ShiftSums
from lockin_fast.ops.segment_stats import segment_stats
from lockin_fast.sae import SparseAutoencoder

Conversation = Sequence[Mapping[str, str]]
BATCH_SIZE = 16


def mean_shift(
    adapted: Any,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    sae: SparseAutoencoder,
    layer: int,
    *,
    batch_size: int = BATCH_SIZE,
    step_done: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Delta_k = mean over conversations of the mean over tokens of z_k(fine-tuned) - z_k(base), fp64 [F].

    As `measure_shift` of one layer, where the arguments are told.
    """
    sums = measure_shift(adapted, tokenizer, conversations, {layer: sae}, batch_size=batch_size, step_done=step_done)
    return sums[layer].statistics().shift


@torch.no_grad()
def measure_shift(
    adapted: Any,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    saes: Mapping[int, SparseAutoencoder],
    *,
    batch_size: int = BATCH_SIZE,
    store: ShiftStore | None = None,
    step_done: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, ShiftSums]:
    """{layer: sums over conversations} of z(fine-tuned) - z(base) for every latent of every layer's SAE.

    adapted: a PEFT model; its base is the same model with the adapters off. conversations: chat messages that both
    read, system messages left out. saes: the SAE of each decoder layer (0-based), all on the model's device. z is the
    dense ReLU code at that layer's output. batch_size: conversations of one forward, the longest first. store: where
    the sums are kept after every batch; a kill then costs one batch, and of several processes each does its share:
    what is returned is this process' share where `store.world` is above 1, of which `store.merged()` makes the whole.

    One pass of both streams to the deepest layer for every conversation. Beside the hidden states of one batch it holds
    8 bytes for each conversation of the batch and latent, never [tokens, F]; padding is not encoded.
    Raises ValueError, before any work, for a layer out of range, an SAE of another width, no conversations, or one of
    which nothing is left without its system message; FloatingPointError for a hidden state that is not finite.
    Source: BLOCK-EM, arXiv 2602.00767, first stage of the discovery.
    """
    _check(adapted, saes, batch_size)
    rows = tokenised(tokenizer, conversations)
    base, tuned = (Reference(adapted, *saes, adapters=adapters) for adapters in (True, False))
    device = decoder_layer(adapted, min(saes)).parameters().__next__().device
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    store = store or ShiftStore()
    todo, sums = store.open(rows, batches, {layer: len(sae.bias) for layer, sae in saes.items()})
    total = sum(len(batches[number]) for number in store.share(len(batches)))
    done = total - sum(len(batches[number]) for number in todo)
    if done and todo:
        step_done(done, total)
    for number in todo:
        batch = batches[number]
        arguments, real = _padded([rows[i] for i in batch], device)
        streams = tuned.hidden_states((), arguments), base.hidden_states((), arguments)
        for layer, sae in saes.items():
            h, h_ref = (_finite(sae.normalize(stream[layer][real]), layer, batch) for stream in streams)
            lengths = [len(rows[i]) for i in batch]
            sums[layer] += ShiftSums.of(segment_stats(h, sae.weight, sae.bias, lengths, h_ref=h_ref), lengths)
        store.keep(number, sums)
        done += len(batch)
        step_done(done, total)
    return sums


def tokenised(tokenizer: Any, conversations: Sequence[Conversation]) -> list[list[int]]:
    """Token ids of every conversation without its system messages. Raises ValueError where nothing is left."""
    if not conversations:
        raise ValueError("conversations: got none, expected at least one")
    rows = []
    for number, messages in enumerate(conversations, 1):
        told = [message for message in messages if message["role"] != "system"]
        text = tokenizer.apply_chat_template(told, tokenize=False) if told else ""
        rows.append(tokenizer(text, add_special_tokens=False)["input_ids"] if text else [])
        if not rows[-1]:
            raise ValueError(f"conversations: number {number} has no token once its system message is left out")
    return rows


def _check(adapted: Any, saes: Mapping[int, SparseAutoencoder], batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected 1 or more")
    if not saes:
        raise ValueError("saes: got none, expected the SAE of at least one layer")
    width = hidden_size(adapted)
    for layer, sae in saes.items():
        decoder_layer(adapted, layer)
        if sae.d_model != width:
            raise ValueError(
                f"saes: that of layer {layer} reads hidden states of width {sae.d_model}, but the model's are {width} "
                "wide; give the SAE that was trained on this model"
            )


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """The model's arguments for rows filled up on the right, and which tokens are real, [B, S]."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)
    real = torch.arange(length, device=device) < torch.tensor([len(row) for row in rows], device=device)[:, None]
    return {"input_ids": ids, "attention_mask": real.long()}, real


def _finite(h: Tensor, layer: int, batch: Sequence[int]) -> Tensor:
    if not bool(h.isfinite().all()):
        raise FloatingPointError(
            f"layer {layer}: a hidden state is not finite in one of the conversations {sorted(i + 1 for i in batch)}; "
            "use bf16 or fp32 instead of fp16, and see that model and adapter are whole"
        )
    return h
