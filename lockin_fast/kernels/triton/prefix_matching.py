"""Mass on the induction stripe: a program runs the keys past a tile of queries, with an online softmax."""

import torch
import triton
import triton.language as tl

from lockin_fast.kernels import Refused
from lockin_fast.kernels.repeats import repeated
from lockin_fast.kernels.triton._tiles import INTERPRETING, check_dtype

WIDEST = 256


@triton.jit
def prefix_kernel(
    q, q_batch, q_head, q_stride, k, k_batch, k_head, k_stride, tokens, counts, shares, scale, H, group, T, D,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    tile, batch, head = tl.program_id(0), tl.program_id(1).to(tl.int64) // H, tl.program_id(1).to(tl.int64) % H
    rows = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    counted = tl.load(counts + batch * T + rows, mask=rows < T, other=0) != 0
    total = 0.0
    if tl.sum(counted.to(tl.int32)) > 0:
        queries = q + batch * q_batch + head * q_head + rows.to(tl.int64)[:, None] * q_stride
        keys = k + batch * k_batch + (head // group) * k_head
        own = tl.load(tokens + batch * T + rows, mask=rows < T, other=0)
        largest = tl.full((BLOCK_T,), float("-inf"), dtype=tl.float32)
        sums = tl.zeros((BLOCK_T,), dtype=tl.float32)
        mass = tl.zeros((BLOCK_T,), dtype=tl.float32)
        for k0 in range(0, tl.minimum((tile + 1) * BLOCK_T, T), BLOCK_K):
            columns = k0 + tl.arange(0, BLOCK_K)
            logits = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
            for part in range(PARTS):
                d = part * BLOCK_D + tl.arange(0, BLOCK_D)
                x = tl.load(queries + d[None, :], mask=(rows < T)[:, None] & (d < D)[None, :], other=0.0)
                places = keys + columns.to(tl.int64)[None, :] * k_stride + d[:, None]
                y = tl.load(places, mask=(columns < T)[None, :] & (d < D)[:, None], other=0.0)  # transposed
                if UPCAST:
                    x = x.to(tl.float32)
                    y = y.to(tl.float32)
                logits = tl.dot(x, y, logits, input_precision="ieee")
            logits = tl.where(columns[None, :] <= rows[:, None], logits * scale, float("-inf"))
            raised = tl.maximum(largest, tl.max(logits, axis=1))
            shift = tl.where(raised == float("-inf"), 0.0, raised)
            weight = tl.exp(logits - shift[:, None])
            after = tl.load(tokens + batch * T + columns - 1, mask=(columns > 0) & (columns < T), other=0)
            stripe = (own[:, None] == after[None, :]) & (columns > 0)[None, :]
            factor = tl.exp(largest - shift)
            sums = sums * factor + tl.sum(weight, axis=1)
            mass = mass * factor + tl.sum(tl.where(stripe, weight, 0.0), axis=1)
            largest = raised
        total = tl.sum(tl.where(counted, mass / sums, 0.0), axis=0)
    tl.store(shares + tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tile, total)


def sizes(width, dtype):
    """Constants of the launch. Only 16-bit heads of up to 128, which need no loop, leave room for large tiles."""
    low = dtype != torch.float32
    block = min(max(triton.next_power_of_2(width), 16), 128 if low else 32)
    parts = triton.cdiv(width, block)
    return {
        "BLOCK_T": 64 if low else 32, "BLOCK_K": 64 if low and parts == 1 else 32, "BLOCK_D": block, "PARTS": parts,
        "UPCAST": INTERPRETING, "num_warps": 4 if low and parts == 1 else 8, "num_stages": 2,
    }  # fmt: skip


def prefix_matching(q, k, tokens, scale):
    """Scores [B, H]; see `lockin_fast.ops.prefix_matching`."""
    check_dtype(q.dtype)
    (B, H, T, D), groups = q.shape, k.shape[1]
    if D > WIDEST:
        raise Refused(f"heads wider than {WIDEST} run on the reference alone")
    q, k = (x if x.stride(3) == 1 or D <= 1 else x.contiguous() for x in (q, k))
    again = repeated(tokens)
    constants = sizes(D, q.dtype)
    tiles = triton.cdiv(T, constants["BLOCK_T"])
    shares = torch.empty((B, H, tiles), dtype=torch.float32, device=q.device)
    if shares.numel():
        prefix_kernel[(tiles, B * H)](
            q, *q.stride()[:3], k, *k.stride()[:3], tokens, again.view(torch.uint8), shares, scale, H, H // groups, T,
            D, **constants,
        )  # fmt: skip
    return shares.sum(2) / again.sum(1)[:, None]
