"""patch_ is a copy, so that everything here is exact; the oracle writes one row after the other."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from threads import on_threads

from lockin_fast import patch_, quantize_nf4

op = torch.ops.lockin_fast.patch_.default
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (4, 48), (31, 123), (5, 1100), (64, 2304), (9, 4096), (0, 48), (5, 0)]


def inputs(tokens, width, dtype, seed=0):
    """h [N, d], distinct rows [P] in no order, source [P, d]."""
    make = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, width, generator=make).to(dtype)
    rows = torch.randperm(tokens, generator=make)[: (tokens + 1) // 2]
    return h, rows, torch.randn(rows.shape[0], width, generator=make).to(dtype)


def patched(h, rows, source):
    out = h.clone()
    for row, new in zip(rows.tolist(), source, strict=True):
        out[row] = new
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_listed_rows_are_written_and_no_others(dtype, shape):
    h, rows, source = inputs(*shape, dtype)
    expected = patched(h, rows, source)
    assert patch_(h, rows, source) is h
    assert torch.equal(h, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pairs_are_row_and_position(dtype):
    h, rows, source = inputs(12, 48, dtype)
    expected = patched(h, rows, source).view(3, 4, 48)
    pairs = torch.stack((rows // 4, rows % 4), 1)
    assert torch.equal(patch_(h.clone().view(3, 4, 48), pairs, source), expected)
    assert torch.equal(patch_(h.clone().view(3, 4, 48), rows, source), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("offset", "aligned"), [(0, 4096), (1, 4096), (7, 4096)])
def test_large_patches_reach_unaligned_rows_and_nothing_beside_them(dtype, offset, aligned):
    # Beyond 4 MB rows are stored past the caches, whole lines at a time.
    width, rows = aligned + 13, torch.arange(600).flip(0)
    memory = torch.zeros(600, width + 2 * 16, dtype=dtype)
    h = memory[:, offset : offset + width]
    source = torch.randn(1, width).to(dtype).expand(600, width) + rows[:, None].to(dtype)
    patch_(h, rows, source)
    assert torch.equal(h[rows], source)
    assert not memory[:, :offset].any() and not memory[:, offset + width :].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype):
    h, rows, source = inputs(12, 48, dtype)
    expected = patched(h, rows, source)
    transposed = h.t().contiguous().t()
    assert torch.equal(patch_(transposed, rows, source), expected)
    assert torch.equal(patch_(h.clone(), rows, source.t().contiguous().t()), expected)
    inside = torch.zeros(3, 7, 48, dtype=dtype)
    inside[:, 2:6] = h.view(3, 4, 48)
    patch_(inside[:, 2:6], rows, source)
    assert torch.equal(inside[:, 2:6].reshape(12, 48), expected)
    assert not inside[:, :2].any() and not inside[:, 6:].any()
    every_other = torch.stack((rows, rows), 1)[:, 0]
    assert torch.equal(patch_(h.clone(), every_other, source), expected)
    one = source[:1].expand(rows.shape[0], 48)
    assert torch.equal(patch_(h.clone(), rows, one), patched(h, rows, one))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("start", "width", "pitch"), [(0, 48, 64), (1, 48, 64), (0, 43, 64), (0, 48, 49)])
def test_rows_at_any_address_of_any_length_and_any_distance(dtype, start, width, pitch):
    memory, others = torch.zeros(9, pitch).to(dtype), torch.randn(9, pitch).to(dtype)
    h, source = (x[:, start : start + width] for x in (memory, others))
    rows = torch.arange(9).flip(0)
    patch_(h, rows, source)
    assert torch.equal(h[rows], source) and memory.count_nonzero() == source.count_nonzero()


def test_the_source_is_cast():
    h, rows, source = inputs(8, 48, torch.bfloat16)
    precise = torch.randn(4, 48)
    assert torch.equal(patch_(h.clone(), rows, precise), patched(h, rows, precise.bfloat16()))


@pytest.mark.parametrize("shape", [(6, 48), (2, 3, 48), (2, 3, 0)], ids=str)
def test_the_source_may_be_a_part_of_h(shape):
    h = torch.randn(*shape)
    tokens = h.view(6, shape[-1])
    rows = torch.arange(1, 6)
    expected = patched(tokens, rows, tokens[:5].clone())
    assert torch.equal(patch_(h, rows, tokens[:5]).view(expected.shape), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_copied_whatever_they_mean(dtype):
    whole = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    make = torch.Generator().manual_seed(1)
    limit = torch.iinfo(whole)
    source = torch.randint(limit.min, limit.max, (16, 123), generator=make, dtype=whole)
    source[0, :4] = torch.tensor([torch.nan, torch.inf, 1e30, 1e-42]).to(dtype).view(whole)
    h = torch.zeros(40, 123, dtype=dtype)
    patch_(h, torch.arange(3, 35, 2), source.view(dtype))
    assert torch.equal(h.view(whole)[3:35:2], source)


def test_a_position_outside_of_h_is_skipped_by_the_op_and_refused_by_the_function():
    h, _, source = inputs(5, 48, torch.float32)
    rows = torch.tensor([-1, 3, 5, 2**40, -(2**62)])
    source = torch.randn(5, 48)
    expected = h.clone()
    expected[3] = source[1]
    op(h, rows, source)
    assert torch.equal(h, expected)
    for position in (-1, 5):
        with pytest.raises(ValueError, match=f"positions: got {position}, expected 0 to 4"):
            patch_(h, torch.tensor([0, position]), source[:2])
    for pair in ([0, 5], [1, -1], [1, 0]):
        with pytest.raises(ValueError, match="positions: got .*, expected 0 to [04]"):
            patch_(h[None], torch.tensor([[0, 0], pair]), source[:2])
    assert torch.equal(h, expected)


def test_gradients():
    x, source = torch.randn(3, 4, 48, requires_grad=True), torch.randn(2, 48, requires_grad=True)
    rows, scale = torch.tensor([[0, 1], [2, 3]]), torch.randn(3, 4, 48)
    (patch_(x * 2.0, rows, source) * scale).sum().backward()
    expected = 2.0 * scale
    expected[rows[:, 0], rows[:, 1]] = 0.0
    assert torch.equal(x.grad, expected)
    assert torch.equal(source.grad, scale[rows[:, 0], rows[:, 1]])


def test_autograd_sees_what_is_written_over():
    x = torch.randn(4, 48, requires_grad=True)
    y = x.sigmoid()  # keeps its output
    with torch.no_grad():
        patch_(y, torch.tensor([1]), torch.zeros(1, 48))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with pytest.raises(ValueError, match="h: is a leaf that requires grad"):
        patch_(x, torch.tensor([1]), torch.zeros(1, 48))
    with torch.no_grad():
        assert not patch_(x, torch.tensor([1]), torch.zeros(1, 48))[1].any()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="triton's interpreter is not for two threads")
def test_two_threads_at_once_and_any_number_of_threads():
    cases = [inputs(200, 2304, torch.bfloat16, seed) for seed in range(4)]
    expected = [patched(*case) for case in cases]
    with ThreadPoolExecutor(2) as pool:
        for got, right in zip(pool.map(lambda case: patch_(case[0].clone(), *case[1:]), cases), expected, strict=True):
            assert torch.equal(got, right)
    for threads in (1, 3):
        with on_threads(threads):
            assert torch.equal(patch_(cases[0][0].clone(), *cases[0][1:]), expected[0])


@pytest.mark.parametrize(("width", "outliers"), [(192, 0), (192, 3), (1088, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nf4_rows_are_written_as_they_decode(dtype, width, outliers, poisoned_memory):
    h, rows, source = inputs(31, width, dtype)
    packed = quantize_nf4(source, blocksize=64, outliers=outliers)
    expected = patched(h, rows, packed.dequantize(dtype))
    assert torch.equal(patch_(h.clone(), rows, packed), expected)
    memory = torch.zeros(31, width + 8, dtype=dtype)
    inside = memory[:, 3 : width + 3]
    patch_(inside, rows, packed)
    assert torch.equal(inside[rows], packed.dequantize(dtype)) and memory[:, width + 3 :].count_nonzero() == 0
    transposed = h.t().contiguous().t()
    assert torch.equal(patch_(transposed, rows, packed), expected)
    outside = rows.clone()
    outside[0], outside[1] = -1, 31
    again = h.clone()
    torch.ops.lockin_fast.patch_nf4_.default(again, outside, *packed.operands(dtype))
    assert torch.equal(again, patched(h, rows[2:], packed.dequantize(dtype)[2:]))
    x = h.float().clone().requires_grad_()
    patch_(x * 1.0, rows, packed).sum().backward()
    assert torch.equal(x.grad[rows], torch.zeros(16, width)) and x.grad.sum() == 15 * width
    with pytest.raises(ValueError, match=rf"source: got an NF4Tensor \(16, {width}\), expected \[15, {width}\]"):
        patch_(h, rows[1:], packed)


H, ROWS, SOURCE = torch.zeros(2, 3, 48), torch.tensor([[0, 1]]), torch.zeros(1, 48)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0.0], ROWS, SOURCE), TypeError, "h: got list"),
        ((H.double(), ROWS, SOURCE), TypeError, "h: got torch.float64"),
        ((H[:1, :1].expand(2, 3, 48), ROWS, SOURCE), ValueError, r"h: got an expanded tensor, \(2, 3, 48\)"),
        ((H[0, 0], ROWS, SOURCE), ValueError, r"h: got shape \(48,\), expected \[B, S, d\] or \[N, d\]"),
        ((H, [[0, 1]], SOURCE), TypeError, "positions: got list"),
        ((H, ROWS.int(), SOURCE), TypeError, "positions: got torch.int32, expected int64"),
        ((H, torch.ones(2, 3, dtype=torch.bool), SOURCE), TypeError, r"pass mask.nonzero\(\)"),
        ((H, torch.zeros(1, 3, dtype=torch.int64), SOURCE), ValueError, r"positions: got shape \(1, 3\)"),
        ((H[0], ROWS, SOURCE), ValueError, r"expected \[P\] as h is \[N, d\]"),
        ((H, ROWS.to("meta"), SOURCE), ValueError, "positions: is on meta, but h is on cpu"),
        ((H, ROWS, None), TypeError, "source: got NoneType"),
        ((H, ROWS, SOURCE[0]), ValueError, r"source: got torch.float32 \(48,\)"),
        ((H, ROWS, SOURCE.long()), ValueError, "source: got torch.int64"),
        ((H, ROWS, SOURCE.to("meta")), ValueError, "source: is on meta"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        patch_(*arguments)
