"""The k largest latents of a full-width encode: a slab of latents at a time is encoded into scratch memory, and what
is among a token's k largest joins them in a list.

The list stays in the order of indices. What enters it is decided by a threshold, found by bisection on the bits of the
values: its cost depends neither on k nor much on the data, and most tokens leave early, with nothing to add.
"""

import torch
import triton
import triton.language as tl

from lockin_fast.kernels import Refused
from lockin_fast.kernels.triton._tiles import check_dtype, with_rows
from lockin_fast.kernels.triton.encode_latents import encode_into

ROWS, COLUMNS = 1536, 8192  # of the scratch memory: 48 MB; 384 tiles of a product are 2.9 rounds of 132 processors
MOST = 4096  # latents of a token that are kept in registers


@triton.jit
def _key(value):
    """Integers in the order of values that are >= 0 or NaN: their bits, and one for every NaN above infinity's."""
    return tl.where(value != value, 0x7F800001, value.to(tl.int32, bitcast=True))


@triton.jit
def _count(chosen):
    return tl.sum(tl.where(chosen, 1.0, 0.0), axis=0).to(tl.int32)


@triton.jit
def select_kernel(
    z, z_stride, values, indices, first, columns, k, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    slot = tl.arange(0, BLOCK_L)
    listed = slot < k
    values += row * k
    indices += row * k
    old_value = tl.load(values + slot, mask=listed, other=0.0)
    old_index = tl.load(indices + slot, mask=listed, other=-1)
    new_value = tl.load(z + row * z_stride + c, mask=c < columns, other=0.0)
    # An empty place in the list is below every value; what is no place at all is below that.
    old = tl.where(old_index >= 0, _key(old_value), -1)
    low = tl.min(tl.where(listed, old, 0x7FFFFFFF), axis=0)
    old = tl.where(listed, old, -2)
    new = tl.where(c < columns, _key(new_value), -2)
    high = tl.max(new, axis=0)
    if high > low:
        # The k-th largest of both: the greatest key that at least k of them reach.
        high = tl.maximum(high, tl.max(old, axis=0))
        while low < high:
            middle = low + (high - low + 1) // 2
            reach = _count(old >= middle) + _count(new >= middle)
            high = tl.where(reach == k, middle, tl.where(reach < k, middle - 1, high))
            low = tl.where(reach >= k, middle, low)
        # Above it all, of its equals the first: those listed, then in the order of their indices.
        spare = k - _count(old > low) - _count(new > low)
        old_equal, new_equal = tl.where(old == low, 1, 0), tl.where(new == low, 1, 0)
        old_taken = (old > low) | ((old == low) & (tl.cumsum(old_equal, 0) <= spare))
        spare -= _count(old == low)
        new_taken = (new > low) | ((new == low) & (tl.cumsum(new_equal, 0) <= spare))
        old_place = tl.cumsum(tl.where(old_taken, 1, 0), 0) - 1
        new_place = tl.cumsum(tl.where(new_taken, 1, 0), 0) - 1 + _count(old_taken)
        tl.debug_barrier()  # the list is read by all before any of it is overwritten
        tl.store(values + old_place, old_value, mask=old_taken)
        tl.store(indices + old_place, old_index, mask=old_taken)
        tl.store(values + new_place, new_value, mask=new_taken)
        tl.store(indices + new_place, (first + c).to(tl.int64), mask=new_taken)


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
    for t0 in range(0, T, ROWS):
        rows = slice(t0, t0 + ROWS)
        for first in range(0, F, COLUMNS):
            part = slice(first, first + COLUMNS)
            floor = None if threshold is None else threshold[part]
            z = scratch[: h[rows].shape[0], : weight[part].shape[0]]
            encode_into(z, h[rows], weight[part], bias[part], floor)
            select_kernel[(z.shape[0],)](
                z, z.stride(0), values[rows], indices[rows], first, z.shape[1], k, block, slots,
                num_warps=min(max(block // 1024, 4), 8),
            )  # fmt: skip
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values, indices.gather(1, order)
