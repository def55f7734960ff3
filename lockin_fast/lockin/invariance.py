"""Prompt invariance: how much what a model says depends on the wording of the question."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lockin_fast.generation import tokenised
from lockin_fast.lockin.intervals import Interval, bootstrap
from lockin_fast.lockin.suite_files import Cluster
from lockin_fast.ops.js_divergence import js_divergence
from lockin_fast.patching.forward import Runner
from lockin_fast.patching.tokens import following, left_padded


class Divergence(NamedTuple):
    """How much the output distributions of a cluster differ, in bits: right after the prompt, and along the reply."""

    next_token: float
    sequence: float


class ClusterTokens(NamedTuple):
    """A cluster as token ids: its prompts with the generation prompt, and the reply that all of them are read with."""

    prompts: Sequence[Sequence[int]]
    reply: Sequence[int]


@dataclass(frozen=True)
class Invariance:
    """Prompt invariance PII, in bits: 0 is a model whose distributions do not depend on the wording at all.

    next_token, sequence: means over the clusters that were measured, with their intervals of the bootstrap over
    clusters. clusters: the divergences of every cluster, None where it was masked; masked: how many were.
    """

    next_token: float
    sequence: float
    next_token_interval: Interval
    sequence_interval: Interval
    clusters: tuple[Divergence | None, ...]
    masked: int


def prompt_invariance(
    clusters: Iterable[Tensor], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Invariance:
    """Mean over paraphrase clusters of the generalised Jensen-Shannon divergence of the output distributions, in bits.

        PII = mean over clusters of JSD(p_1 .. p_n),   JSD = H(mean of p_i) - mean of H(p_i),   log to base 2

    once with p_i the next-token distribution after paraphrase i, and once as the mean of JSD over the positions of one
    reply that all paraphrases of the cluster are continued with (teacher forcing).

    clusters: for each the logits [n, S, V] of n paraphrases, position 0 right after the prompt and position t after t
    tokens of the reply (`forced_logits` makes them); [n, 1, V] where there is no reply, whose sequence divergence is
    that of the next token. They are taken one at a time, so they need not all be in memory. A cluster with NaN in its
    logits (or +inf, or nothing but -inf) at any position is a failed evaluation: masked in both means, and counted.

    Range [0, log2(n)] a cluster: with n alike in all clusters, figures compare. The sequence divergence is usually the
    smaller, as the reply's own words soon outweigh the wording of the question.

    Raises ValueError for no cluster, none that was measured, and a cluster that `cluster_divergence` refuses, with its
    number. Costs two reads of the logits.

    Source: [paper] arXiv 2510.20190; which positions: [ours].
    """
    found: list[Divergence | None] = []
    for number, logits in enumerate(clusters):
        try:
            bits = cluster_divergence(logits)
        except (TypeError, ValueError) as error:
            raise ValueError(f"clusters: number {number}: {error}") from None
        found.append(bits if math.isfinite(bits.sequence) else None)
    kept = [bits for bits in found if bits is not None]
    if not kept:
        raise ValueError(
            f"clusters: none of {len(found)} was measured: their logits hold NaN"
            if found
            else "clusters: got none, expected the logits of at least one"
        )
    columns = np.array(kept)  # [clusters, 2]
    options = {"level": level, "resamples": resamples, "seed": seed}
    intervals = [bootstrap(column, lambda drawn: drawn.mean(-1), **options) for column in columns.T]
    return Invariance(*columns.mean(0).tolist(), *intervals, tuple(found), len(found) - len(kept))


def cluster_divergence(logits: Tensor) -> Divergence:
    """The divergence of one cluster's logits [n, S, V] at position 0, and its mean over the S positions, in bits.

    Both NaN-propagating: NaN at a position makes what rests on it NaN. Raises ValueError for other shapes, fewer than
    two paraphrases, no position, and a vocabulary of one token, whose distributions cannot differ; TypeError for a
    dtype that holds no logits.
    """
    if logits.dim() != 3:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected [n, S, V]")
    n, positions, vocabulary = logits.shape
    if n < 2:
        raise ValueError(f"logits: got {n} paraphrases, expected at least two, as a single one differs from nothing")
    if positions == 0:
        raise ValueError("logits: got no position, expected at least the one after the prompt")
    if vocabulary < 2:
        raise ValueError(f"logits: got a vocabulary of {vocabulary}, expected at least two tokens to choose from")
    bits = js_divergence(logits).double()
    return Divergence(*torch.stack([bits[0], bits.mean()]).tolist())


def cluster_tokens(tokenizer: Any, cluster: Cluster) -> ClusterTokens:
    """A cluster's paraphrases as user messages in the chat template, and its reply, as token ids.

    Raises ValueError for a reply without tokens, and where the tokenizer makes two paraphrases one (words it does not
    know): their distributions would agree whatever the model.
    """
    prompts, _ = tokenised(tokenizer, [[{"role": "user", "content": text}] for text in cluster.paraphrases])
    reply = tokenizer(cluster.reply, add_special_tokens=False)["input_ids"]
    if not reply:
        raise ValueError(f"cluster {cluster.name}: the tokenizer makes no token of its reply {cluster.reply!r}")
    if len(set(map(tuple, prompts))) < len(prompts):
        raise ValueError(
            f"cluster {cluster.name}: the tokenizer makes the same tokens of two paraphrases; write clusters in words "
            "that it knows"
        )
    return ClusterTokens(prompts, reply)


def forced_logits(runner: Runner, clusters: Sequence[ClusterTokens], *, batch_size: int) -> Iterator[Tensor]:
    """For each cluster in turn the logits [n, S, V] before each of the S tokens of its reply, in the model's dtype.

    Prompts of several clusters share a forward, as many as fit in `batch_size` rows, and a cluster is never split.
    Costs one forward over all prompts and replies, and the logits of one batch, rows * S * V, in memory.
    Raises ValueError, before any work, for a cluster without paraphrases or with an empty prompt or reply.
    """
    for number, cluster in enumerate(clusters):
        if not cluster.prompts or not all(map(len, cluster.prompts)) or not len(cluster.reply):
            raise ValueError(f"clusters: number {number} is empty, or a prompt or the reply of it has no token")
    return _batched(runner, clusters, batch_size)


@torch.no_grad()
def _batched(runner: Runner, clusters: Sequence[ClusterTokens], batch_size: int) -> Iterator[Tensor]:
    waiting: list[ClusterTokens] = []
    for cluster in clusters:
        if waiting and sum(len(c.prompts) for c in (*waiting, cluster)) > batch_size:
            yield from _forward(runner, waiting)
            waiting = []
        waiting.append(cluster)
    if waiting:
        yield from _forward(runner, waiting)


def _forward(runner: Runner, clusters: Sequence[ClusterTokens]) -> list[Tensor]:
    prompts = left_padded([prompt for cluster in clusters for prompt in cluster.prompts], runner.device)
    replies = following(prompts, [cluster.reply for cluster in clusters for _ in cluster.prompts])
    at = replies.real.nonzero()  # row by row, so that a cluster's are next to each other
    at[:, 1] += prompts.input_ids.shape[1] - 1  # a token is predicted by the one before it
    logits = runner.run(prompts.joined(replies.without_last()), logits_at=at).logits
    sizes = [len(cluster.prompts) * len(cluster.reply) for cluster in clusters]
    return [
        part.view(len(cluster.prompts), len(cluster.reply), -1)
        for part, cluster in zip(logits.split(sizes), clusters, strict=True)
    ]
