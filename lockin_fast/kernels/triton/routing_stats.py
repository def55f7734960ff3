"""Sums over tokens of how a layer routes: a program takes tiles of tokens, all experts at once, and writes once."""

import torch
import triton
import triton.language as tl

from lockin_fast.kernels.triton._tiles import check_dtype, with_rows

LAUNCH = {"num_warps": 4, "num_stages": 2}
TILE_ELEMENTS = 4096
TAKEN = tl.constexpr(-(2**31))


@triton.jit
def ranks(x):
    """int32 in the order of the floats x, all above TAKEN; -0 ranks as 0 and NaN as Inf."""
    bits = (tl.where(x != x, float("inf"), x) + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def routing_kernel(
    logits, stride, classes, mask, probability, entropy, table, T, E, C, tiles, SIGMOID: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    experts = tl.arange(0, BLOCK_E)
    real = (experts < E)[None, :]
    total = tl.zeros((BLOCK_E,), dtype=tl.float64)
    total_entropy = tl.zeros((BLOCK_T,), dtype=tl.float64)
    first = tl.program_id(0).to(tl.int64) * tiles * BLOCK_T
    for i in range(0, tiles):
        tokens = first + i * BLOCK_T + tl.arange(0, BLOCK_T)
        keep = tokens < T
        if mask is not None:
            keep = keep & (tl.load(mask + tokens, mask=keep, other=0) != 0)
        tile = keep[:, None] & real
        x = tl.load(logits + tokens[:, None] * stride + experts[None, :], mask=tile, other=0.0).to(tl.float32)
        rank = tl.where(real, ranks(x), TAKEN)
        if SIGMOID:  # sigmoid(x) / sum sigmoid(x) is the softmax of log sigmoid(x)
            x = tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - tl.log(1.0 + tl.exp(-tl.abs(x)))
        x = tl.where(real, x, float("-inf"))
        x -= tl.max(x, axis=1)[:, None]
        power = tl.exp(x)
        mass = tl.sum(power, axis=1)[:, None]
        p = power / mass
        log_p = x - tl.log(mass)
        total += tl.sum(tl.where(tile, p, 0.0).to(tl.float64), axis=0)
        total_entropy -= tl.sum(tl.where(tile & (p != 0.0), p * log_p, 0.0), axis=1).to(tl.float64)
        label = tl.full((BLOCK_T,), 0, dtype=tl.int64) + C
        if classes is not None:
            given = tl.load(classes + tokens, mask=keep, other=-1)
            label = tl.where((given >= 0) & (given < C), given, label)
        for _ in range(0, TOP_K):
            best = tl.argmax(rank, axis=1)
            tl.atomic_add(table + label * E + best, tl.full((BLOCK_T,), 1, dtype=tl.int64), mask=keep)
            rank = tl.where(experts[None, :] == best[:, None], TAKEN, rank)
    tl.store(probability + tl.program_id(0).to(tl.int64) * E + experts, total, mask=experts < E)
    tl.store(entropy + tl.program_id(0), tl.sum(total_entropy))


def sizes(experts):
    """Constants of the launch."""
    block = max(triton.next_power_of_2(experts), 2)
    return {"BLOCK_T": max(min(TILE_ELEMENTS // block, 64), 1), "BLOCK_E": block}


def routing_stats(logits, classes, mask, num_classes, top_k, sigmoid):
    """Probability [E], entropy, counts [E], class counts [C, E], tokens; see `lockin_fast.routing_stats`."""
    check_dtype(logits.dtype)
    logits = with_rows(logits)
    T, E = logits.shape
    keep = None if mask is None else mask.view(torch.uint8)  # bytes load in wide words, booleans through the stack
    constants = sizes(E)
    token_tiles = max(triton.cdiv(T, constants["BLOCK_T"]), 1)
    shares = min(128, token_tiles)
    tiles = triton.cdiv(token_tiles, shares)
    probability = torch.empty((shares, E), dtype=torch.float64, device=logits.device)
    entropy = torch.empty((shares,), dtype=torch.float64, device=logits.device)
    table = torch.zeros((num_classes + 1, E), dtype=torch.int64, device=logits.device)  # the last row: of no class
    routing_kernel[(shares,)](
        logits, logits.stride(0), classes, keep, probability, entropy, table, T, E, num_classes, tiles, sigmoid, top_k,
        **constants, **LAUNCH,
    )  # fmt: skip
    tokens = mask.sum() if mask is not None else torch.full((), T, dtype=torch.int64, device=logits.device)
    return probability.sum(0), entropy.sum(), table.sum(0), table[:num_classes].clone(), tokens
