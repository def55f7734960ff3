"""Prefix-matching scores of a layer's heads on random tokens repeated twice, against the attention matrix in torch.

Only the second copy is asked about, so half of the queries and three quarters of the causal matrix are needed.
"""

from functools import partial

import torch

import lockin_fast
from benchmarks.case import Case, Work

HEADS, LENGTH, WIDTH = 16, 4096, 64


def diagonal(attention, offset):
    """Mean attention from t to t - offset; the first entry belongs to the first copy's last query."""
    return attention.diagonal(-offset, dim1=-2, dim2=-1)[..., 1:].float().mean(-1)


def eager(q, k):
    """As users write it: the attention matrix of every head, then its diagonal."""
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    logits = (q @ k.mT) * q.shape[3] ** -0.5
    return diagonal(logits.masked_fill(later, -torch.inf).softmax(-1), q.shape[2] // 2 - 1)


def second_copy(q, k):
    """The same, head by head and for the second copy's queries alone: less is computed, and memory stays warm."""
    length = q.shape[2]
    half = length // 2
    later = torch.ones(half, length, dtype=torch.bool).triu(half + 1)
    scores = torch.empty(q.shape[:2])
    for h in range(q.shape[1]):
        logits = (q[:, h, half:] @ k[:, h].mT).mul_(q.shape[3] ** -0.5)
        attention = logits.masked_fill_(later, -torch.inf).softmax(-1)
        scores[:, h] = attention.diagonal(1, dim1=-2, dim2=-1).float().mean(-1)
    return scores


def flash(q, k):
    """The log-sum-exp of torch's flash attention on the CPU (which wants values, here the keys), and the stripe."""
    half = q.shape[2] // 2
    normaliser = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, 0.0, True)[1]
    stripe = (q[:, :, half:].float() * k[:, :, 1 : half + 1].float()).sum(-1) * q.shape[3] ** -0.5
    return (stripe - normaliser[:, :, half:]).exp().mean(-1)


def flash_second_copy(q, k):
    """The same for the second copy's queries alone: all keys of the first copy, and the causal part of the second."""
    half = q.shape[2] // 2
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    q, first, second = q[:, :, half:], k[:, :, :half], k[:, :, half:]
    normaliser = torch.logaddexp(flash(q, first, first, 0.0, False)[1], flash(q, second, second, 0.0, True)[1])
    stripe = (q.float() * k[:, :, 1 : half + 1].float()).sum(-1) * q.shape[3] ** -0.5
    return (stripe - normaliser).exp().mean(-1)


def providers(q, k, tokens):
    found = {
        "eager": partial(eager, q, k),
        "eager, second copy": partial(second_copy, q, k),
        "prefix_matching": partial(lockin_fast.prefix_matching, q, k, tokens),
    }
    if q.device.type == "cpu":
        found["flash log-sum-exp"] = partial(flash, q, k)
        found["flash log-sum-exp, second copy"] = partial(flash_second_copy, q, k)
    return found


def work(dtype):
    torch.manual_seed(0)
    q, k = (torch.randn(1, HEADS, LENGTH, WIDTH).to(dtype) for _ in range(2))
    tokens = torch.randperm(50_000)[: LENGTH // 2].repeat(1, 2)
    keys = 3 * LENGTH**2 // 8  # of all queries of the second copy together
    return Work(
        providers(q, k, tokens) | {"torch.compile": partial(torch.compile(eager), q, k)},
        ours=("prefix_matching",),
        bytes=(q.numel() // 2 + k.numel()) * q.element_size() + 8 * LENGTH,
        flops=2 * HEADS * keys * WIDTH,
    )


def cases():
    for dtype in (torch.float32, torch.bfloat16):
        shape = {"H": HEADS, "T": LENGTH, "D": WIDTH, "dtype": dtype}
        yield Case(str(dtype)[6:], shape, partial(work, dtype), ("prefix_matching",), rounds=5)
