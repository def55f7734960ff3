"""What the kernels share: the tile product h W^T of one stream or two, and what the interpreter cannot do."""

import torch
import triton
import triton.language as tl

from lockin_fast.kernels import Refused

INTERPRETING = triton.knobs.runtime.interpret


@triton.jit
def project(
    h, h_stride, to_ref, ref_stride, weight, first, keep, latents, K, D, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """weight[latents] @ h[first:][:BLOCK_T]^T in fp32, [BLOCK_K, BLOCK_T], and the same of h_ref (without it, of h).

    Both streams are columns of one product, a token's two side by side: they share the weight's tiles, equal ones come
    out equal to the bit, and a thread holds both. h_ref is given as its distance from h, as addresses that are chosen
    between are not known to be aligned. Rows that are not kept are never read and count as zeros.
    """
    if to_ref is None:
        column = tl.arange(0, BLOCK_T)
        columns = h + (first + column).to(tl.int64) * h_stride
        read = keep
        acc = tl.zeros((BLOCK_K, BLOCK_T), dtype=tl.float32)
    else:
        column = tl.arange(0, 2 * BLOCK_T)
        token = (first + column // 2).to(tl.int64)
        columns = h + (token * h_stride + column % 2 * (token * (ref_stride - h_stride) + to_ref))
        read = tl.interleave(keep, keep)
        acc = tl.zeros((BLOCK_K, 2 * BLOCK_T), dtype=tl.float32)
    rows = weight + latents.to(tl.int64) * D
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        w = tl.load(rows[:, None] + d[None, :], mask=(latents < K)[:, None] & (d < D)[None, :], other=0.0)
        x = tl.load(columns[None, :] + d[:, None], mask=read[None, :] & (d < D)[:, None], other=0.0)
        if UPCAST:
            w = w.to(tl.float32)
            x = x.to(tl.float32)
        acc = tl.dot(w, x, acc, input_precision="ieee")
    if to_ref is None:
        return acc, acc
    else:
        return tl.split(tl.reshape(acc, (BLOCK_K, BLOCK_T, 2)))


@triton.jit
def floor_of(threshold, latents, K):
    """What a pre-activation has to exceed for the latent to be on: max(threshold, 0), one a latent."""
    floor = tl.zeros(latents.shape, dtype=tl.float32)
    if threshold is not None:
        floor = tl.maximum(tl.load(threshold + latents, mask=latents < K, other=0.0), 0.0)
    return floor


@triton.jit
def activate(pre, floor):
    """pre where it is above the floor, else 0; the comparison keeps NaN."""
    return tl.where(pre <= floor, 0.0, pre)


@triton.jit
def count_positive(x, axis: tl.constexpr):
    """How many entries are > 0, as int32. Summed as floats, exact at a tile's size; bits get counted on the stack."""
    return tl.sum(tl.where(x > 0.0, 1.0, 0.0), axis=axis).to(tl.int32)


@triton.jit
def grouped(program, rows, columns, GROUP: tl.constexpr):
    """Row and column of a tile such that programs that run together share few rows and few columns, for the L2."""
    inside = GROUP * columns
    first = program // inside * GROUP
    height = min(rows - first, GROUP)
    return first + program % inside % height, program % inside // height


def with_rows(x):
    """`x` [rows, columns] with unit stride along the columns, which is what the kernels address; None stays None."""
    return x if x is None or x.stride(1) == 1 else x.contiguous()


def distance(h, h_ref):
    """Elements from h to h_ref, for `project`; None without one."""
    return None if h_ref is None else (h_ref.data_ptr() - h.data_ptr()) // h.element_size()


def as_bytes(mask):
    """A mask as the kernels read it: bytes load in wide words, booleans through the stack."""
    return None if mask is None else mask.view(torch.uint8)


def check_dtype(dtype):
    """Refuse what a kernel cannot compute rightly here."""
    if dtype == torch.float64:
        raise Refused("float64 runs on the reference alone")
    if INTERPRETING and dtype == torch.bfloat16:
        raise Refused("bfloat16 is silently wrong in triton's interpreter")
