"""The k largest latents of a full-width encode: a slab of latents at a time is encoded into scratch memory, and what
is among a token's k largest joins them in a list.

The list stays in the order of indices. What enters it is decided by a threshold, found by bisection on the bits of the
values: its cost depends neither on k nor much on the data, and most tokens leave early, with nothing to add.
"""

import torch
import triton
import triton.language as tl

from lockin_fast.kernels import Refused
from lockin_fast.kernels.triton._tiles import INTERPRETING, check_dtype, with_rows
from lockin_fast.kernels.triton.encode_latents import encode_into

ROWS, COLUMNS = 1536, 8192  # of the scratch memory: 48 MB; 384 tiles of a product are 2.9 rounds of 132 processors
MOST = 4096  # latents of a token that are kept in registers


@triton.jit
def _key(value):
    """Integers in the order of values that are >= 0 or NaN: their bits, and one for every NaN above infinity's."""
    return tl.where(value != value, 0x7F800001, value.to(tl.int32, bitcast=True))


@triton.jit
def _value(key):
    return tl.where(key == 0x7F800001, float("nan"), key.to(tl.float32, bitcast=True))


@triton.jit
def _places(key, cut, spare):
    """Which keys are taken, all above the cut and the first `spare` at it, and their places among those, from one."""
    order = tl.cumsum(tl.where(key > cut, 1, tl.where(key == cut, 0x10000, 0)), 1)  # both counts in one scan
    above, equal = order & 0xFFFF, order >> 16
    return (key > cut) | ((key == cut) & (equal <= spare)), above + tl.minimum(equal, spare)


@triton.jit
def select_kernel(
    z, z_stride, values, indices, first, columns, T, k, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    c, slot = tl.arange(0, BLOCK_C)[None, :], tl.arange(0, BLOCK_L)[None, :]
    listed, real = (token < T) & (slot < k), (token < T) & (c < columns)
    place = token * k
    index = tl.load(indices + place + slot, mask=listed, other=-1)
    # An empty place in the list is below every value; what is no place at all is below that.
    old = tl.where(index >= 0, _key(tl.load(values + place + slot, mask=listed, other=0.0)), -1)
    low = tl.min(tl.where(listed, old, 0x7FFFFFFF), axis=1)
    old = tl.where(listed, old, -2)
    new = tl.where(real, _key(tl.load(z + token * z_stride + c, mask=real, other=0.0)), -2)
    high = tl.max(new, axis=1)
    high = tl.where(high > low, tl.maximum(high, tl.max(old, axis=1)), low)
    if tl.max(high - low, axis=0) > 0:
        # The k-th largest of both: the greatest key that at least k of them reach.
        while tl.max(high - low, axis=0) > 0:
            middle = low + (high - low + 1) // 2
            reach = tl.sum(tl.where(old >= middle[:, None], 1, 0), axis=1)
            reach += tl.sum(tl.where(new >= middle[:, None], 1, 0), axis=1)
            high = tl.where(reach == k, middle, tl.where(reach < k, middle - 1, high))
            low = tl.where(reach >= k, middle, low)
        # Of its equals the first: those listed, then in the order of their indices.
        cut = low[:, None]
        above = tl.sum(tl.where(old > cut, 1, 0), axis=1)
        spare = k - above - tl.sum(tl.where(new > cut, 1, 0), axis=1)
        equal = tl.minimum(tl.sum(tl.where(old == cut, 1, 0), axis=1), spare)
        old_taken, old_place = _places(old, cut, spare[:, None])
        new_taken, new_place = _places(new, cut, (spare - equal)[:, None])
        old_place += place - 1
        new_place += place + (above + equal - 1)[:, None]
        tl.debug_barrier()  # the list is read by all before any of it is overwritten
        tl.store(values + old_place, _value(old), mask=old_taken)
        tl.store(indices + old_place, index, mask=old_taken)
        tl.store(values + new_place, _value(new), mask=new_taken)
        tl.store(indices + new_place, (first + c).to(tl.int64) + 0 * token, mask=new_taken)


def encode_topk(h, weight, bias, threshold, k):
    """Values [T, k] fp32 in descending order and indices [T, k]; see `lockin_fast.encode_topk`."""
    check_dtype(h.dtype)
    if k > MOST:
        raise Refused(f"more than {MOST} latents of a token do not fit in registers")
    h, weight = with_rows(h), weight.contiguous()
    T, F = h.shape[0], weight.shape[0]
    values = torch.empty((T, k), dtype=torch.float32, device=h.device)
    indices = torch.full((T, k), -1, dtype=torch.int64, device=h.device)
    if not values.numel():
        return values, indices
    scratch = torch.empty((min(T, ROWS), min(F, COLUMNS)), dtype=torch.float32, device=h.device)
    block, slots = triton.next_power_of_2(scratch.shape[1]), triton.next_power_of_2(k)
    tokens = 64 if INTERPRETING else 1  # of a program
    for t0 in range(0, T, ROWS):
        rows = slice(t0, t0 + ROWS)
        for first in range(0, F, COLUMNS):
            part = slice(first, first + COLUMNS)
            floor = None if threshold is None else threshold[part]
            z = scratch[: h[rows].shape[0], : weight[part].shape[0]]
            encode_into(z, h[rows], weight[part], bias[part], floor)
            select_kernel[(triton.cdiv(z.shape[0], tokens),)](
                z, z.stride(0), values[rows], indices[rows], first, z.shape[1], z.shape[0], k, tokens, block, slots,
                num_warps=min(max(block // 512, 4), 16),
            )  # fmt: skip
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values, indices.gather(1, order)
