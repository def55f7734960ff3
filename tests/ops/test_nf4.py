"""nf4_quantize and nf4_dequantize: exact, so every comparison here is for equality."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from threads import on_threads
from torch._subclasses.fake_tensor import FakeTensorMode

import lockin_fast.ops  # noqa: F401, registers the ops
from lockin_fast.kernels.codebook import CODEBOOK

ops = torch.ops.lockin_fast
quantize, dequantize = ops.nf4_quantize.default, ops.nf4_dequantize.default
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# tokens, width, blocksize
SHAPES = [
    (1, 16, 16), (7, 48, 16), (5, 64, 64), (33, 128, 32), (9, 192, 64), (2, 2048, 2048), (3, 2304, 256),
    (2, 4096, 4096),
]  # fmt: skip
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
VALUES = torch.tensor(CODEBOOK, dtype=torch.float32)
not_interpreted = pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="triton's interpreter is not for this")


def rows(tokens, width, dtype, scale=1.0, seed=0):
    return (torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def hard_rows(dtype):
    """Blocks of 32 with what is rare in them: NaN, infinities, zeros of both signs, huge and denormal numbers."""
    h = rows(12, 64, dtype)
    h[0, 5], h[1, 40], h[2, 1] = torch.nan, torch.inf, -torch.inf
    h[3], h[4] = 0.0, -0.0
    limits = torch.finfo(dtype)
    h[5] = h[5].sign() * limits.max
    h[6] *= limits.tiny
    h[7] *= limits.smallest_normal / 8
    h[8] = limits.smallest_normal * limits.eps  # the smallest number there is
    h[9, :32] = 1e30 if dtype != torch.float16 else 6e4
    return h


def nibbles(codes):
    return torch.stack((codes >> 4, codes & 15), 2).flatten(1).long()


def nearest(h, blocksize):
    """Codes and scales by the definition, with distances in fp64; a tie goes to the lower code."""
    blocks = h.float().view(h.shape[0], h.shape[1] // blocksize, blocksize)
    absmax = blocks.abs().max(2).values
    scaled = (blocks * (1 / absmax.clamp_min(1e-38))[:, :, None]).double().flatten(1)
    distance = (scaled[:, :, None] - VALUES.double()).abs()
    return distance.argmin(2), absmax, distance.sort(2).values.diff(dim=2)[:, :, 0] > 1e-7


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_are_the_nearest_and_scales_the_largest(dtype, shape, poisoned_memory):
    tokens, width, blocksize = shape
    h = rows(tokens, width, dtype)
    codes, absmax, outliers = quantize(h, blocksize, None)
    expected, scale, clear = nearest(h, blocksize)
    assert codes.dtype is torch.uint8 and outliers.shape == (tokens, 0) and outliers.dtype is dtype
    same(absmax, scale)
    assert clear.float().mean() > 0.99
    assert torch.equal(nibbles(codes)[clear], expected[clear])


def test_every_bucket_of_values_and_both_sides_of_every_boundary():
    boundaries = (VALUES[1:] + VALUES[:-1]) / 2
    ends = [torch.nextafter(boundaries, torch.full((15,), end)) for end in (-2.0, 2.0)]
    x = torch.cat([torch.linspace(-1, 1, 4096 - 48), boundaries, *ends, torch.ones(3)]).view(64, 64)
    x[:, 0] = 1.0
    codes = nibbles(quantize(x, 64, None)[0])
    assert torch.equal(codes, (x[:, :, None] > boundaries).sum(2))


@pytest.mark.parametrize("blocksize", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_equal_to_bitsandbytes(dtype, blocksize):
    bnb = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    for scale in (1.0, 1e-6, 1e-37, 1e4, 1e30):
        h = rows(40, 256, dtype, scale)
        h[:12, :64] = hard_rows(dtype)
        codes, absmax, _ = quantize(h, blocksize, None)
        theirs, state = bnb.quantize_4bit(h, blocksize=blocksize, quant_type="nf4")
        assert torch.equal(codes.view(-1), theirs.view(-1)), scale
        same(absmax.view(-1), state.absmax)
        back, expected = dequantize(codes, absmax, None, None, blocksize, dtype), bnb.dequantize_4bit(theirs, state)
        # Their bf16 rounding takes numbers under 2^-126 for zero.
        normal = (dtype != torch.bfloat16) | (absmax.repeat_interleave(blocksize, 1) > 1e-36) | (absmax == 0).all()
        normal = torch.as_tensor(normal).expand_as(back) | back.isnan()
        same(torch.where(normal, back, 0), torch.where(normal, expected, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_rows_agree_with_the_definition(dtype, poisoned_memory):
    h = hard_rows(dtype)
    codes, absmax, _ = quantize(h, 32, None)
    expected, scale, clear = nearest(h, 32)
    same(absmax, scale)
    finite = scale.isfinite().repeat_interleave(32, 1)
    assert torch.equal(nibbles(codes)[finite & clear], expected[finite & clear])
    assert (nibbles(codes)[0, :32] == 15).all(), "a block with NaN"
    assert nibbles(codes)[1, 40] == 15 and (nibbles(codes)[1, 32:40] == 7).all(), "a block with Inf"
    back = dequantize(codes, absmax, None, None, 32, dtype)
    assert back[0, :32].isnan().all() and not back[1, 32:].isfinite().any() and not back[2, :32].isfinite().any()
    assert (back[3:5] == 0).all() and back[5:].isfinite().all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantised_values_are_code_times_scale_rounded_once(dtype, shape, poisoned_memory):
    tokens, width, blocksize = shape
    make = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, (tokens, width // 2), generator=make, dtype=torch.uint8)
    for scale in (1.0, 1e-39, 1e-41, 1e4, 1e30):
        absmax = torch.rand(tokens, width // blocksize, generator=make) * scale
        exact = VALUES.double()[nibbles(codes)] * absmax.double().repeat_interleave(blocksize, 1)
        same(dequantize(codes, absmax, None, None, blocksize, dtype), exact.float().to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_decoded_values_halfway_between_two_round_to_the_even_one(dtype):
    ulp = torch.finfo(dtype).eps
    absmax = torch.tensor([[1 + ulp / 2], [1 + 3 * ulp / 2]])
    back = dequantize(torch.full((2, 16), 0xFF, dtype=torch.uint8), absmax, None, None, 32, dtype)
    assert (back[0] == 1.0).all() and (back[1] == 1 + 2 * ulp).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outlier_channels_count_as_zero_and_come_back_as_they_were(dtype, shape, poisoned_memory):
    tokens, width, blocksize = shape
    h = rows(tokens, width, dtype)
    channels = torch.tensor(sorted({0, 3, width // 2, width - 1}), dtype=torch.int32)
    h[:, channels.long()] *= 60
    without = h.clone()
    without[:, channels.long()] = 0
    codes, absmax, outliers = quantize(h, blocksize, channels)
    expected = quantize(without, blocksize, None)
    assert torch.equal(codes, expected[0]) and torch.equal(outliers, h[:, channels.long()])
    same(absmax, expected[1])
    back = dequantize(codes, absmax, channels, outliers, blocksize, dtype)
    without = dequantize(codes, absmax, None, None, blocksize, dtype)
    without[:, channels.long()] = h[:, channels.long()]
    same(back, without)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_an_outlier_channel_stays_there(dtype):
    h = rows(4, 64, dtype)
    h[2, 9] = torch.nan
    channels = torch.tensor([9], dtype=torch.int32)
    codes, absmax, outliers = quantize(h, 32, channels)
    back = dequantize(codes, absmax, channels, outliers, 32, dtype)
    assert back.isnan().nonzero().tolist() == [[2, 9]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_transposed_rows(dtype):
    h = rows(24, 64, dtype)
    expected = quantize(h, 32, None)
    wide = torch.full((24, 200), torch.nan, dtype=dtype)
    wide[:, 3:67] = h
    apart = torch.full((48, 64), torch.nan, dtype=dtype)
    apart[::2] = h
    for same_rows in (wide[:, 3:67], apart[::2], h.t().contiguous().t()):
        for got, want in zip(quantize(same_rows, 32, None), expected, strict=True):
            assert torch.equal(got, want)
    codes, absmax, _ = expected
    back = dequantize(codes, absmax, None, None, 32, dtype)
    strided = codes.repeat(1, 2)[:, :32], absmax.t().contiguous().t()
    assert torch.equal(dequantize(*strided, None, None, 32, dtype), back)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0)], ids=str)
def test_nothing_to_do(shape):
    channels = torch.tensor([], dtype=torch.int32)
    for chosen in (None, channels):
        codes, absmax, outliers = quantize(torch.zeros(shape), 32, chosen)
        assert codes.shape == (shape[0], shape[1] // 2) and absmax.shape == (shape[0], shape[1] // 32)
        kept = None if chosen is None else outliers
        assert dequantize(codes, absmax, chosen, kept, 32, torch.float32).shape == shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [4096])
def test_a_large_result_is_the_same_by_parts_and_on_any_number_of_threads(dtype, width, poisoned_memory):
    h = rows(2200, width, dtype)
    whole = quantize(h, 64, None)
    back = dequantize(*whole[:2], None, None, 64, dtype)
    parts = [quantize(part, 64, None) for part in h.split(500)]
    for got, want in zip(whole, map(torch.cat, zip(*parts, strict=True)), strict=True):
        assert torch.equal(got, want)
    small = [dequantize(codes, absmax, None, None, 64, dtype) for codes, absmax, _ in parts]
    assert torch.equal(back, torch.cat(small))
    channels = torch.tensor([0, 70, width - 1], dtype=torch.int32)
    codes, absmax, outliers = quantize(h, 64, channels)
    aside = dequantize(codes, absmax, channels, outliers, 64, dtype)[:, channels.long()]
    assert torch.equal(aside, h[:, channels.long()])
    for threads in (1, 3):
        with on_threads(threads):
            again = quantize(h, 64, None)
            assert torch.equal(dequantize(*again[:2], None, None, 64, dtype), back)
        assert torch.equal(again[0], whole[0]) and torch.equal(again[1], whole[1])


@not_interpreted
def test_two_threads_at_once_give_the_same():
    problems = [rows(300, 64, torch.float32, seed=seed) for seed in range(2)]
    channels = torch.tensor([1, 40], dtype=torch.int32)
    expected = [quantize(h, 32, channels) for h in problems]
    with ThreadPoolExecutor(2) as pool:
        for i, got in enumerate(pool.map(lambda i: quantize(problems[i % 2], 32, channels), range(40))):
            assert all(torch.equal(a, b) for a, b in zip(got, expected[i % 2], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(dtype):
    h, channels = rows(9, 64, dtype), torch.tensor([3, 40], dtype=torch.int32)
    codes, absmax, outliers = quantize(h, 32, channels)
    for op, arguments in (
        (quantize, (h, 32, None)),
        (quantize, (h, 32, channels)),
        (dequantize, (codes, absmax, None, None, 32, dtype)),
        (dequantize, (codes, absmax, channels, outliers, 32, dtype)),
    ):
        torch.library.opcheck(op, arguments, test_utils=CHECKS)


def test_shapes_are_known_without_values():
    with FakeTensorMode():
        channels = torch.empty(3, dtype=torch.int32)
        codes, absmax, outliers = quantize(torch.empty(9, 64, dtype=torch.bfloat16), 32, channels)
        assert (codes.shape, absmax.shape, outliers.shape) == ((9, 32), (9, 2), (9, 3))
        assert outliers.dtype is torch.bfloat16
        back = dequantize(codes, absmax, channels, outliers, 32, torch.bfloat16)
        assert back.shape == (9, 64) and back.dtype is torch.bfloat16


@not_interpreted
@pytest.mark.parametrize("channels", [[-1], [64], [3, 64]])
def test_a_channel_outside_of_the_row_raises(channels):
    channels = torch.tensor(channels, dtype=torch.int32)
    codes, absmax, _ = quantize(rows(4, 64, torch.float32), 32, None)
    with pytest.raises((RuntimeError, IndexError)):
        quantize(rows(4, 64, torch.float32), 32, channels)
    with pytest.raises((RuntimeError, IndexError)):
        dequantize(codes, absmax, channels, torch.zeros(4, len(channels)), 32, torch.float32)
