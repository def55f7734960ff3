"""Induction heads: how much each attention head looks at what followed the current token the last time."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lockin_fast.blocking.layers import text_config
from lockin_fast.ops.prefix_matching import prefix_matching
from lockin_fast.patching.heads import AttentionCall, attention_calls, run_decoder, watched_attention


def repeated_tokens(
    pool: Tensor, length: int, sequences: int, *, seed: int, start: int | None = None
) -> tuple[Tensor, Tensor]:
    """Random tokens repeated twice, and a corrupted copy in which the first half is of other tokens: int64 [N, T].

    pool: ids to draw from. length: tokens S of one copy, all different within a sequence, so that a token occurred once
    before and the stripe is one position: from t to t - (S - 1). sequences: N. start: an id before both copies (BOS),
    or None. T is 2 S, plus 1 for a start. Both sequences of a row share their second copy, position by position.

    Raises ValueError where the pool is too small: 2 S ids are needed.
    """
    if not 2 <= length <= len(pool) // 2:
        raise ValueError(
            f"length: got {length} tokens a copy, expected 2 to {len(pool) // 2}: a sequence and its corruption draw "
            f"2 x length different ones from the {len(pool)} tokens of the vocabulary"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([torch.randperm(len(pool), generator=generator)[: 2 * length] for _ in range(sequences)])
    copies, others = pool[drawn].split(length, 1)
    first = copies[:, :0] if start is None else torch.full_like(copies[:, :1], start)
    return torch.cat([first, copies, copies], 1), torch.cat([first, others, copies], 1)


def prefix_scores(model: nn.Module, tokens: Tensor, *, batch_size: int = 8) -> Tensor:
    """Prefix-matching score of every head on every sequence, float32 [N, layers, H] on the CPU; never [T, T].

    model: a causal language model of transformers, adapters and quantisation included. tokens: ids [N, T], such as
    `repeated_tokens` makes. The score is that of `lockin_fast.prefix_matching` on the layer's own queries and keys: on
    random tokens repeated twice the mean attention from t to t - (S - 1) over the second copy, in [0, 1].

    Raises ValueError, naming the reason, for attention that is no plain causal softmax of scaled products: soft-capped
    logits, sinks, a window shorter than the sequence, position biases; for eager attention, which makes the matrices
    that this leaves out; and for a sequence longer than the model's positions.

    Costs the decoder's forward and at most B H T^2 D FLOPs a layer; memory beyond the forward's: none that grows with
    H T^2. Olsson et al., "In-context Learning and Induction Heads" (2022).
    """
    check_attention(model, tokens.shape[1])
    found = []
    for rows in tokens.split(batch_size):
        scores: dict[int, Tensor] = {}

        def score(call: AttentionCall, output: Tensor, rows=rows, scores=scores) -> None:
            _check(call, rows.shape[1])
            query, key = call.query, call.key
            scores[call.layer] = prefix_matching(query, key, rows.to(query.device), call.scaling)

        with watched_attention(model, score):
            run_decoder(model, rows)
        found.append(torch.stack([scores[layer].cpu() for layer in sorted(scores)], 1))
    return torch.cat(found)


class Scores(NamedTuple):
    """Mean over the seeds, and its standard error over them, NaN where there is one seed."""

    mean: Tensor
    error: Tensor


def over_seeds(means: Tensor) -> Scores:
    """Mean and standard error over seeds of what is the mean over sequences at each, [seeds, ...]."""
    spread = means.std(0) if len(means) > 1 else torch.full_like(means[0], torch.nan)
    return Scores(means.mean(0), spread / len(means) ** 0.5)


def flagged(scores: Tensor, thresholds: Sequence[float]) -> list[Tensor]:
    """The heads whose score reaches each threshold: bool [layers, H], a subset of those of any lower threshold."""
    return [scores >= threshold for threshold in thresholds]


def check_attention(model: nn.Module, length: int) -> None:
    """Raise ValueError unless the prefix matching of every head can be read on sequences of this many tokens."""
    positions = getattr(text_config(model), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(
            f"tokens: sequences of {length} tokens, but {type(model).__name__} has {positions} positions; shorten them"
        )
    for call in attention_calls(model):
        _check(call, length)


def _check(call: AttentionCall, length: int) -> None:
    """Raise ValueError unless the attention is softmax(scale * q k^T) over everything up to the query."""
    window = call.options.get("sliding_window")
    reasons = (
        (call.options.get("softcap") is not None, "soft-caps its logits"),
        (call.options.get("s_aux") is not None, "has attention sinks"),
        (call.options.get("position_bias") is not None, "adds a position bias to its logits"),
        (window is not None and window <= length, f"sees only the last {window} of {length} tokens"),
        (not getattr(call.module, "is_causal", True), "is not causal"),
        (call.module.config._attn_implementation == "eager", "is eager (load it with attn_implementation='sdpa')"),
        (call.mask is not None, "masks more than the tokens to come"),
    )
    for holds, reason in reasons:
        if holds:
            raise ValueError(
                f"model: the attention of layer {call.layer} ({type(call.module).__name__}) {reason}, so prefix "
                "matching cannot be read from its queries and keys"
            )
