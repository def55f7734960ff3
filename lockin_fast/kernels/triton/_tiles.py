"""What the kernels share: the tile product h W^T, tile sizes, and what the interpreter cannot be trusted with."""

import torch
import triton
import triton.language as tl

from lockin_fast.kernels import Refused

INTERPRETING = triton.knobs.runtime.interpret


@triton.jit
def project(
    h, h_stride, weight, tokens, keep, latents, K, D, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """h[tokens] @ weight[latents]^T in fp32. Rows that are not kept are never read, so that they hold zeros here."""
    acc = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
    rows = h + tokens.to(tl.int64)[:, None] * h_stride
    columns = weight + latents.to(tl.int64)[None, :] * D
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        x = tl.load(rows + d[None, :], mask=keep[:, None] & (d < D)[None, :], other=0.0)  # [BLOCK_T, BLOCK_D]
        w = tl.load(columns + d[:, None], mask=(latents < K)[None, :] & (d < D)[:, None], other=0.0)  # transposed
        if UPCAST:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    return acc


@triton.jit
def activate(pre, threshold, latents, K):
    """relu(pre) where pre > threshold, else 0; the comparison keeps NaN."""
    floor = 0.0
    if threshold is not None:
        floor = tl.maximum(tl.load(threshold + latents, mask=latents < K, other=0.0), 0.0)[None, :]
    return tl.where(pre <= floor, 0.0, pre)


@triton.jit
def count_positive(x, axis: tl.constexpr):
    """How many entries are > 0, as int32. Summed as floats, exact at a tile's size; bits get counted on the stack."""
    return tl.sum(tl.where(x > 0.0, 1.0, 0.0), axis=axis).to(tl.int32)


def tile_sizes(tokens, latents, dtype):
    """BLOCK_T, BLOCK_K, BLOCK_D of a narrow op: few tokens a tile while there are too few tiles to fill the chip."""
    return {
        "BLOCK_T": 32 if tokens <= 8192 else 64,
        "BLOCK_K": min(max(triton.next_power_of_2(latents), 16), 64),
        "BLOCK_D": 32 if dtype == torch.float32 else 64,  # 128 bytes a row
        "UPCAST": INTERPRETING,
    }


def with_rows(x):
    """`x` [rows, columns] with unit stride along the columns, which is what the kernels address; None stays None."""
    return x if x is None or x.stride(1) == 1 else x.contiguous()


def check_dtype(dtype):
    """Refuse what a kernel cannot compute rightly here."""
    if dtype == torch.float64:
        raise Refused("float64 runs on the reference alone")
    if INTERPRETING and dtype == torch.bfloat16:
        raise Refused("bfloat16 is silently wrong in triton's interpreter")
