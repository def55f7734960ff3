import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from penalty_oracle import assert_as_good_as_torch
from threads import on_threads

from lockin_fast import steer_

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    (1, 1, 1), (3, 5, 48), (7, 1, 123), (2, 2, 1100), (4, 9, 2304), (2, 3, 4096), (0, 3, 48), (3, 0, 48), (3, 2, 0),
]  # fmt: skip


def inputs(rows, positions, width, dtype, directions=5, direction_dtype=torch.float32, seed=0):
    make = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, positions, width, generator=make).to(dtype)
    index = torch.randint(0, directions, (rows,), generator=make)
    rand = torch.randn(directions, width, generator=make) * 3.0
    return h, rand.to(direction_dtype), index, torch.randn(rows, generator=make) * 4.0


def steered(h, directions, index, coefficient, work):
    """The formula written out; rows one after the other."""
    out = h.to(work, copy=True)
    for r, (i, c) in enumerate(zip(index.tolist(), coefficient.to(work), strict=True)):
        direction = directions[i].to(work)
        out[r] += c * (direction / direction.norm())
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("direction_dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_good_as_plain_torch(dtype, direction_dtype, shape, poisoned_memory):
    arguments = inputs(*shape, dtype, direction_dtype=direction_dtype)
    truth, yardstick = steered(*arguments, torch.float64), steered(*arguments, torch.float32)
    h = arguments[0].clone()
    assert steer_(h, *arguments[1:]) is h
    assert_as_good_as_torch("steered", h, truth, yardstick.to(dtype))
    if shape[1] == 1:
        flat = arguments[0].clone().squeeze(1)
        assert torch.equal(steer_(flat, *arguments[1:]), h.squeeze(1))


def test_by_hand():
    h = torch.ones(3, 2, 2)
    directions = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    steer_(h, directions, torch.tensor([0, -1, 1]), torch.tensor([10.0, 1.0, 1.0]))
    assert h.tolist() == [[[7.0, 9.0]] * 2, [[1.0, 1.0]] * 2, [[1.0, 1.0]] * 2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_left_alone_keep_their_bits(dtype):
    h, directions, index, coefficient = inputs(6, 3, 123, dtype)
    h[:5, 0, :4] = torch.tensor([torch.nan, -0.0, torch.inf, 1e-7]).to(dtype)
    directions[3], directions[4] = 0.0, torch.nan
    index[:] = torch.tensor([-1, 3, 4, 4, 5, 0])  # none, zero, NaN unread, NaN unread, beyond F
    coefficient[:] = torch.tensor([torch.nan, 2.0, 0.0, -0.0, 3.0, 1.0])
    before = h.clone()
    torch.ops.lockin_fast.steer_.default(h, directions, index, coefficient)
    whole = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    nan = before[:5].isnan()
    assert torch.equal(h[:5].isnan(), nan)
    assert torch.equal(h[:5].view(whole)[~nan], before[:5].view(whole)[~nan])
    assert not torch.equal(h[5], before[5])


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-38, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_size_of_a_direction_does_not_matter(dtype, scale):
    h, directions, index, coefficient = inputs(4, 3, 48, dtype)
    directions = directions / directions.abs().amax()
    large = directions * scale
    truth = steered(h, large, index, coefficient, torch.float64)
    yardstick = steered(h, (large.double() / scale).float(), index, coefficient, torch.float32)
    assert_as_good_as_torch("steered", steer_(h.clone(), large, index, coefficient), truth, yardstick.to(dtype))


def test_a_small_step_along_a_long_direction_is_not_lost():
    direction = torch.randn(1, 48, generator=torch.Generator().manual_seed(0))
    direction *= 3e38 / direction.abs().amax()
    step = steer_(torch.zeros(1, 2, 48), direction, torch.zeros(1, dtype=torch.int64), torch.tensor([1e-6])).double()
    truth = float(torch.tensor(1e-6)) * direction.double() / direction.double().norm()
    assert (step - truth).abs().max() <= 4 * torch.finfo(torch.float32).eps * truth.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_propagate(dtype):
    h, directions, index, coefficient = inputs(5, 2, 48, dtype, directions=3)
    index[:] = torch.tensor([0, 1, 2, 0, 0])
    directions[1, 7], directions[2, 7] = torch.nan, torch.inf
    coefficient[3] = torch.nan
    h[4, 0, 3] = torch.inf
    steer_(h, directions, index, coefficient)
    assert h[0].isfinite().all() and h[1].isnan().all() and h[3].isnan().all()
    assert h[2, :, 7].isnan().all()
    assert h[4].isfinite().sum() == 2 * 48 - 1 and h[4, 0, 3] == torch.inf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern_of_nan_stays_nan(dtype):
    h = torch.zeros(2, 1, 123, dtype=dtype)
    full = torch.full((1, 123), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # rounding up would make it -0
    assert steer_(h, full, torch.zeros(2, dtype=torch.int64), torch.ones(2)).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_round_to_the_nearest_and_ties_to_even(dtype):
    ulp = torch.finfo(dtype).eps
    h, direction = torch.ones(4, 1, 48, dtype=dtype), torch.zeros(1, 48)
    h[2:] += ulp
    direction[0, 40] = 1.0
    steer_(h, direction, torch.zeros(4, dtype=torch.int64), torch.tensor([0.5, 0.75, 0.5, -0.75]) * ulp)
    assert h[:, 0, 40].tolist() == [1.0, 1.0 + ulp, 1.0 + 2 * ulp, 1.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype):
    h, directions, index, coefficient = inputs(3, 11, 48, dtype)
    expected = steer_(h.clone(), directions, index, coefficient)
    memory = torch.zeros(3, 14, 60, dtype=dtype)
    view = memory[:, 2:13, 5:53]
    view.copy_(h)
    steer_(view, directions, index, coefficient)
    assert torch.equal(view, expected) and memory.count_nonzero() == expected.count_nonzero()
    transposed = h.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(steer_(transposed, directions, index, coefficient), expected)
    swapped = h.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(steer_(swapped, directions, index, coefficient), expected)
    other = directions.t().contiguous().t()
    assert torch.equal(steer_(h.clone(), other, index, coefficient), expected)
    apart = torch.cat((directions, directions + 1.0), 1)[:, :48]
    again = h.clone()
    torch.ops.lockin_fast.steer_.default(again, apart, index, coefficient)
    assert torch.equal(again, expected)
    wide = torch.stack((index, coefficient.long()), 1)[:, 0]
    assert torch.equal(steer_(h.clone(), directions, wide, coefficient.double()), expected)


def test_without_directions_nothing_happens():
    h = torch.randn(3, 2, 48)
    assert torch.equal(steer_(h.clone(), torch.zeros(0, 48), torch.full((3,), -1), torch.ones(3)), h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_pass_through(dtype):
    h, directions, index, coefficient = inputs(3, 4, 48, dtype)
    directions.requires_grad_()
    x, scale = h.clone().requires_grad_(), torch.randn(3, 4, 48).to(dtype)
    out = steer_(x * 1.0, directions, index, coefficient)
    (out * scale).sum().backward()
    assert torch.equal(x.grad, scale) and directions.grad is None
    torch.testing.assert_close(out.detach(), steer_(h, directions, index, coefficient))


def test_autograd_sees_what_is_written_over():
    x = torch.randn(3, 48, requires_grad=True)
    arguments = torch.randn(2, 48), torch.zeros(3, dtype=torch.int64), torch.ones(3)
    y = x.sigmoid()
    with torch.no_grad():
        steer_(y, *arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with pytest.raises(ValueError, match="h: is a leaf that requires grad"):
        steer_(x, *arguments)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="triton's interpreter is not for two threads")
def test_two_threads_at_once_and_any_number_of_threads():
    cases = [inputs(9, 30, 2304, torch.bfloat16, seed=seed) for seed in range(4)]
    expected = [steer_(case[0].clone(), *case[1:]) for case in cases]
    with ThreadPoolExecutor(2) as pool:
        for got, right in zip(pool.map(lambda case: steer_(case[0].clone(), *case[1:]), cases), expected, strict=True):
            assert torch.equal(got, right)
    for threads in (1, 4):  # four begin in the middle of a row
        with on_threads(threads):
            assert torch.equal(steer_(cases[0][0].clone(), *cases[0][1:]), expected[0])


H, D, INDEX, C = torch.zeros(2, 3, 48), torch.ones(4, 48), torch.zeros(2, dtype=torch.int64), torch.ones(2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, D, INDEX, C), TypeError, "h: got NoneType"),
        ((H.double(), D, INDEX, C), TypeError, "h: got torch.float64"),
        ((H[:1].expand(2, 3, 48), D, INDEX, C), ValueError, r"h: got an expanded tensor, \(2, 3, 48\).*pass h.clone"),
        ((H[0, 0], D, INDEX, C), ValueError, r"h: got shape \(48,\), expected \[R, S, d\] or \[R, d\]"),
        ((H, D.t(), INDEX, C), ValueError, r"directions: got .*\(48, 4\), expected .*\[F, 48\]"),
        ((H, D.long(), INDEX, C), ValueError, "directions: got torch.int64"),
        ((H, D, INDEX.int(), C), TypeError, "index: got torch.int32, expected int64"),
        ((H, D, INDEX[:1], C), ValueError, r"index: got shape \(1,\), expected \[2\]"),
        ((H, D, INDEX + 4, C), ValueError, "index: got 4, expected -1 to 3"),
        ((H, D, INDEX - 2, C), ValueError, "index: got -2, expected -1 to 3"),
        ((H, D, INDEX, 1.0), TypeError, "coefficient: got float"),
        ((H, D, INDEX, C[:1]), ValueError, r"coefficient: got shape \(1,\), expected \[2\]"),
        ((H, D.to("meta"), INDEX, C), ValueError, "directions: is on meta"),
        ((H, D, INDEX.to("meta"), C), ValueError, "index: is on meta"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        steer_(*arguments)
