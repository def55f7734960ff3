"""NF4: a tile of blocks a program; codes are found and looked up by selects over their bits, in registers."""

import torch
import triton
import triton.language as tl

from lockin_fast.kernels.codebook import BOUNDARIES, CODEBOOK, TINY
from lockin_fast.kernels.triton._tiles import check_dtype, with_rows

TILE = 4096  # elements a program
LAUNCH = {"num_warps": 4}

VALUES = tl.constexpr(CODEBOOK)
BETWEEN = tl.constexpr(BOUNDARIES)
SMALLEST = tl.constexpr(TINY)


@triton.jit
def code_of(x):
    """The nearest code, by binary search over the boundaries, each of which belongs to the code below; 15 for NaN."""
    eight = ~(x <= BETWEEN[7])
    four = ~(x <= tl.where(eight, BETWEEN[11], BETWEEN[3]))
    upper = tl.where(four, BETWEEN[13], BETWEEN[9])
    lower = tl.where(four, BETWEEN[5], BETWEEN[1])
    two = ~(x <= tl.where(eight, upper, lower))
    upper = tl.where(four, tl.where(two, BETWEEN[14], BETWEEN[12]), tl.where(two, BETWEEN[10], BETWEEN[8]))
    lower = tl.where(four, tl.where(two, BETWEEN[6], BETWEEN[4]), tl.where(two, BETWEEN[2], BETWEEN[0]))
    one = ~(x <= tl.where(eight, upper, lower))
    return eight.to(tl.int32) * 8 + four.to(tl.int32) * 4 + two.to(tl.int32) * 2 + one.to(tl.int32)


@triton.jit
def pick(bit, i: tl.constexpr):
    """Values of codes i and i + 1."""
    return tl.where(bit, VALUES[i + 1], VALUES[i])


@triton.jit
def value_of(code):
    """The codebook's value of the lowest four bits, in fp32."""
    one, two, four, eight = (code & 1) != 0, (code & 2) != 0, (code & 4) != 0, (code & 8) != 0
    low = tl.where(two, pick(one, 2), pick(one, 0))
    low = tl.where(four, tl.where(two, pick(one, 6), pick(one, 4)), low)
    high = tl.where(two, pick(one, 10), pick(one, 8))
    high = tl.where(four, tl.where(two, pick(one, 14), pick(one, 12)), high)
    return tl.where(eight, high, low)


@triton.jit
def quantize_kernel(h, h_stride, channels, codes, absmax, blocks, per_row, N, SIZE: tl.constexpr, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = (block < blocks)[:, None]
    token, first = block // per_row, (block % per_row) * SIZE
    column = first[:, None] + tl.arange(0, SIZE)[None, :]
    x = tl.load(h + token[:, None] * h_stride + column, mask=inside, other=0.0).to(tl.float32)  # [BLOCKS, SIZE]
    if channels is not None:
        for j in range(0, N):
            x = tl.where(column == tl.load(channels + j), 0.0, x)
    # As integers, magnitudes compare like the numbers, with NaN above all.
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    inverse = tl.div_rn(1.0, tl.where(largest < SMALLEST, SMALLEST, largest))
    even, odd = tl.split(tl.reshape(code_of(x * inverse[:, None]), (BLOCKS, SIZE // 2, 2)))
    place = block[:, None] * (SIZE // 2) + tl.arange(0, SIZE // 2)[None, :]
    tl.store(codes + place, (even * 16 + odd).to(tl.uint8), mask=inside)
    tl.store(absmax + block, largest, mask=block < blocks)


@triton.jit
def dequantize_kernel(
    codes, absmax, channels, outliers, out, blocks, per_row, N, SIZE: tl.constexpr, BLOCKS: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = (block < blocks)[:, None]
    token, first = block // per_row, (block % per_row) * SIZE
    packed = tl.load(codes + block[:, None] * (SIZE // 2) + tl.arange(0, SIZE // 2)[None, :], mask=inside, other=0)
    code = tl.reshape(tl.join(packed >> 4, packed), (BLOCKS, SIZE))
    x = value_of(code) * tl.load(absmax + block, mask=block < blocks, other=0.0)[:, None]
    if channels is not None:
        column = first[:, None] + tl.arange(0, SIZE)[None, :]
        for j in range(0, N):
            kept = tl.load(outliers + token * N + j, mask=block < blocks, other=0.0).to(tl.float32)
            x = tl.where(column == tl.load(channels + j), kept[:, None], x)
    place = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + place, x.to(out.dtype.element_ty), mask=inside)


def _launch(kernel, arguments, blocks, per_row, count, size):
    if not blocks:
        return
    share = max(TILE // size, 1)
    kernel[(triton.cdiv(blocks, share),)](*arguments, blocks, per_row, count, SIZE=size, BLOCKS=share, **LAUNCH)


def nf4_quantize(h, blocksize, channels):
    """codes [T, d/2], absmax [T, d/blocksize], outliers [T, n]; see `lockin_fast.quantize_nf4`."""
    check_dtype(h.dtype)
    h = with_rows(h)
    (T, D), per_row = h.shape, h.shape[1] // blocksize
    codes = torch.empty((T, D // 2), dtype=torch.uint8, device=h.device)
    absmax = torch.empty((T, per_row), dtype=torch.float32, device=h.device)
    outliers = h.new_empty((T, 0)) if channels is None else h.index_select(1, channels)
    count = outliers.shape[1]
    arguments = h, h.stride(0), channels if count else None, codes, absmax
    _launch(quantize_kernel, arguments, T * per_row, per_row, count, blocksize)
    return codes, absmax, outliers


def nf4_dequantize(codes, absmax, channels, outliers, blocksize, dtype):
    """[T, d] of `dtype`; see `lockin_fast.NF4Tensor`."""
    check_dtype(dtype)
    T, D = codes.shape[0], 2 * codes.shape[1]
    out = torch.empty((T, D), dtype=dtype, device=codes.device)
    count = 0 if channels is None else channels.shape[0]
    kept = (channels, outliers.contiguous()) if count else (None, None)
    per_row = D // blocksize
    _launch(
        dequantize_kernel, (codes.contiguous(), absmax.contiguous(), *kept, out), T * per_row, per_row, count, blocksize
    )
    return out
