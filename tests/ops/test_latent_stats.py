import os
import sys

import pytest
import torch
from memory import printed
from penalty_oracle import assert_as_good_as_torch, clear_of_steps, encode, problem, rounding
from threads import on_threads

import lockin_fast
from lockin_fast import LatentStats
from lockin_fast.ops import _wide
from lockin_fast.ops import latent_stats as op_module

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 48, 1), (70, 123, 13), (33, 2304, 100), (37, 48, 123), (3, 4096, 20), (5, 4096, 400), (5, 1, 2)]
FIELDS = ("sum", "sum_squares", "count", "count_ref", "tokens")


def plain(p):
    """The sums written out over the whole [T, F], for p in any dtype."""
    z = encode(p, p.h)
    value = z if p.h_ref is None else z - encode(p, p.h_ref)
    keep = torch.ones(p.h.shape[0], dtype=torch.bool) if p.mask is None else p.mask
    value, counted = value[keep], z[keep] > 0
    return value.double().sum(0), value.square().double().sum(0), counted.sum(0), keep.sum()


@pytest.mark.parametrize("options", [{}, {"masked": True, "threshold": True}], ids=["plain", "masked-threshold"])
@pytest.mark.parametrize("ref", [None, "h"], ids=["one stream", "difference"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_as_good_as_plain_torch(dtype, shape, ref, options):
    p = problem(*shape, dtype, ref=ref, **options)
    usable = clear_of_steps(p).all(0)
    assert usable.float().mean() > 0.6
    with on_threads(3):
        stats = lockin_fast.latent_stats(p.h, p.weight, p.bias, h_ref=p.h_ref, threshold=p.threshold, mask=p.mask)
    exact = p.at(torch.float64)
    truth, yardstick = plain(exact), plain(p.at(torch.float32))
    one = float(rounding(exact, exact.h).max())  # of a single value, for sums over a single token
    # The sums are in fp64, of values in fp32: the ulps allowed are fp32's, of what is summed and not of what is left.
    assert stats.sum.dtype is stats.sum_squares.dtype is torch.float64
    assert_as_good_as_torch("sum", stats.sum, truth[0], yardstick[0], usable, least=one)
    of_square = 2 * one * float(truth[1].max()) ** 0.5
    assert_as_good_as_torch("sum_squares", stats.sum_squares, truth[1], yardstick[1], usable, least=of_square)
    assert torch.equal(stats.count[usable], truth[2][usable]) and stats.tokens == truth[3]
    if ref is None:
        assert stats.count_ref.shape == (0,)
    else:
        other = plain(problem_of_reference(p).at(torch.float64))
        assert torch.equal(stats.count_ref[usable], other[2][usable])


def problem_of_reference(p):
    return type(p)(**(vars(p) | {"h": p.h_ref, "h_ref": None}))


@pytest.mark.parametrize("ref", [None, "h"], ids=["one stream", "difference"])
def test_tiling_changes_nothing_but_rounding(ref, monkeypatch):
    p = problem(130, 48, 77, torch.float32, ref=ref, masked=True, threshold=True)
    arguments = p.h, p.weight, p.bias, p.h_ref, p.threshold, p.mask
    whole = op_module.reference(*arguments)
    monkeypatch.setattr(_wide, "OPERAND_ELEMENTS", 48 * 50)
    monkeypatch.setattr(_wide, "PRODUCT_ELEMENTS", 1000)
    assert _wide.tile_shape(130, 48, 77) == (50, 20)
    tiled = op_module.reference(*arguments)
    for name, a, b in zip(FIELDS, whole, tiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("ref", [None, "h"], ids=["one stream", "difference"])
def test_a_weight_cast_in_parts_changes_nothing_but_rounding(ref, monkeypatch):
    p = problem(30, 48, 77, torch.bfloat16, ref=ref, masked=True, threshold=True)
    options = {"h_ref": p.h_ref, "threshold": p.threshold, "mask": p.mask}
    whole = lockin_fast.latent_stats(p.h, p.weight, p.bias, **options)
    monkeypatch.setattr(_wide, "CAST_ELEMENTS", 48 * 10)
    for weight in (p.weight.float(), p.weight.t().contiguous().t()):
        parts = lockin_fast.latent_stats(p.h, weight, p.bias, **options)
        for name in FIELDS:
            a, b = getattr(whole, name), getattr(parts, name)
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("outliers", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_reference_in_nf4_is_its_decoded_self_a_few_tokens_at_a_time(dtype, outliers, monkeypatch):
    p = problem(30, 64, 21, dtype, masked=True, threshold=True)
    packed = lockin_fast.quantize_nf4(p.h_ref.view(3, 10, 64), outliers=outliers)
    decoded = []
    decode = type(packed).dequantize
    monkeypatch.setattr(type(packed), "dequantize", lambda self, *to: decoded.append(self.shape) or decode(self, *to))
    monkeypatch.setattr(op_module, "DECODED_ELEMENTS", 64 * 7)
    h, mask = p.h.view(3, 10, 64), p.mask.view(3, 10)
    for weight in (p.weight, p.weight.double()):
        found = lockin_fast.latent_stats(h, weight, p.bias, h_ref=packed, threshold=p.threshold, mask=mask)
    assert decoded == [(7, 64)] * 4 + [(2, 64)] + [(7, 64)] * 4 + [(2, 64)]
    expected = lockin_fast.latent_stats(
        p.h, p.weight, p.bias, h_ref=decode(packed, dtype).view(30, 64), threshold=p.threshold, mask=p.mask
    )
    for name in FIELDS:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5, msg=name)
    nothing = lockin_fast.latent_stats(h[:0], p.weight, p.bias, h_ref=lockin_fast.quantize_nf4(h[:0]))
    assert nothing.tokens == 0 and not nothing.sum.any() and nothing.count_ref.shape == (21,)


def test_merging_equals_one_pass():
    p = problem(90, 48, 20, torch.float32, masked=True)

    def stats(part):
        return lockin_fast.latent_stats(p.h[part], p.weight, p.bias, h_ref=p.h_ref[part], mask=p.mask[part])

    whole, merged = stats(slice(None)), sum(stats(slice(i, i + 30)) for i in (0, 30, 60))
    assert isinstance(merged, LatentStats)
    for name in FIELDS:
        torch.testing.assert_close(getattr(whole, name), getattr(merged, name), rtol=1e-6, atol=1e-6)
    value = (encode(p, p.h) - encode(p, p.h_ref))[p.mask].double()
    torch.testing.assert_close(merged.mean, value.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged.var, value.var(0, correction=0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(merged.rate, (encode(p, p.h)[p.mask] > 0).double().mean(0))


def test_stats_of_different_kinds_do_not_merge():
    p = problem(9, 48, 20, torch.float32)
    difference = lockin_fast.latent_stats(p.h, p.weight, p.bias, h_ref=p.h_ref)
    with pytest.raises(ValueError, match="cannot merge 20 latents of a difference with 20 latents of one stream"):
        difference + lockin_fast.latent_stats(p.h, p.weight, p.bias)
    with pytest.raises(ValueError, match="with 7 latents"):
        difference + lockin_fast.latent_stats(p.h, p.weight[:7], p.bias[:7], h_ref=p.h_ref)
    with pytest.raises(TypeError):
        difference + 1


@pytest.mark.parametrize(("tokens", "latents"), [(0, 5), (4, 0), (0, 0)])
@pytest.mark.parametrize("ref", [None, "h"])
def test_no_tokens_or_no_latents(tokens, latents, ref, poisoned_memory):
    p = problem(tokens, 48, latents, torch.float32, ref=ref)
    stats = lockin_fast.latent_stats(p.h, p.weight, p.bias, h_ref=p.h_ref)
    assert stats.tokens == tokens and stats.sum.shape == stats.count.shape == (latents,)
    if not tokens:
        assert not stats.sum.any() and not stats.sum_squares.any() and not stats.count.any()
        assert stats.mean.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_mask_and_leading_dimensions(dtype, poisoned_memory):
    p = problem(12, 48, 20, dtype, masked=True)
    nothing = lockin_fast.latent_stats(p.h, p.weight, p.bias, mask=torch.zeros(12, dtype=torch.bool))
    assert nothing.tokens == 0 and not nothing.sum.any() and not nothing.count.any()
    flat = lockin_fast.latent_stats(p.h, p.weight, p.bias, h_ref=p.h_ref, mask=p.mask)
    shaped = lockin_fast.latent_stats(
        p.h.view(3, 4, 48), p.weight.float(), p.bias.double(), h_ref=p.h_ref.view(3, 4, 48), mask=p.mask.view(3, 4)
    )
    strided = lockin_fast.latent_stats(
        p.h.t().contiguous().t(), p.weight, p.bias, h_ref=p.h_ref.repeat(1, 2)[:, :48], mask=p.mask
    )
    for name in FIELDS:
        assert torch.equal(getattr(flat, name), getattr(shaped, name))
        assert torch.equal(getattr(flat, name), getattr(strided, name))


@pytest.mark.parametrize("stream", ["h", "h_ref"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_reach_the_sums_unless_masked(bad, stream):
    p = problem(20, 48, 13, torch.float32)
    getattr(p, stream)[3, 5] = bad
    stats = lockin_fast.latent_stats(p.h, p.weight, p.bias, h_ref=p.h_ref)
    assert not stats.sum.isfinite().all() and not stats.sum_squares.isfinite().all()
    mask = torch.ones(20, dtype=torch.bool)
    mask[3] = False
    stats = lockin_fast.latent_stats(p.h, p.weight, p.bias, h_ref=p.h_ref, mask=mask)
    assert stats.sum.isfinite().all() and stats.sum_squares.isfinite().all() and stats.tokens == 19


def test_equal_streams_differ_by_exactly_nothing_and_twice_is_the_same():
    p = problem(70, 123, 20, torch.bfloat16, threshold=True)
    stats = lockin_fast.latent_stats(p.h, p.weight, p.bias, h_ref=p.h.clone(), threshold=p.threshold)
    assert not stats.sum.any() and not stats.sum_squares.any() and torch.equal(stats.count, stats.count_ref)
    again = lockin_fast.latent_stats(p.h, p.weight, p.bias, h_ref=p.h.clone(), threshold=p.threshold)
    assert all(torch.equal(getattr(stats, name), getattr(again, name)) for name in FIELDS)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "") in ("", "0"), reason="a test of the interpreted kernel")
@pytest.mark.parametrize("ref", [None, "h"], ids=["one stream", "difference"])
def test_shares_of_several_tiles_of_the_triton_kernel_change_nothing_but_rounding(ref, monkeypatch):
    from lockin_fast.kernels.triton import _configs
    from lockin_fast.kernels.triton import latent_stats as kernel

    p = problem(300, 48, 13, torch.float32, ref=ref, masked=True)
    arguments = p.h, p.weight, p.bias, p.h_ref, None, p.mask
    monkeypatch.setattr(kernel, "SHARES", 2)
    monkeypatch.setattr(_configs, "chip", lambda device: _configs.Chip(90, 1))
    for name, a, b in zip(FIELDS, kernel.latent_stats(*arguments), op_module.reference(*arguments), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5, msg=name)


def test_many_tokens_do_not_lose_the_small_ones():
    # 2^25 + 2^12 - 1: an fp32 running sum would drop every small addend after the large one.
    tokens = 2**12
    h = torch.ones(tokens, 1)
    h[0] = 2.0**25
    stats = lockin_fast.latent_stats(h, torch.ones(1, 1), torch.zeros(1))
    assert stats.sum.item() == 2.0**25 + tokens - 1
    assert stats.sum_squares.item() == 2.0**50 + tokens - 1
    assert stats.count.item() == stats.tokens == tokens


def test_errors_name_the_argument():
    p = problem(6, 48, 4, torch.float32)
    for changes, text in (
        ({"h_ref": p.h[:5]}, r"^h_ref: got torch.float32 \(5, 48\)"),
        ({"h_ref": p.h.bfloat16()}, "^h_ref: got torch.bfloat16"),
        (
            {"h_ref": lockin_fast.quantize_nf4(p.h[:5], blocksize=16)},
            r"^h_ref: got NF4Tensor\(\(5, 48\), .*expected the shape \(6, 48\) of h",
        ),
        ({"threshold": torch.zeros(5)}, r"^threshold: got shape \(5,\)"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, r"^mask: got shape \(5,\)"),
    ):
        with pytest.raises(ValueError, match=text):
            lockin_fast.latent_stats(p.h, p.weight, p.bias, **changes)
    with pytest.raises(
        TypeError, match="^h_ref: got list, expected a tensor of the shape and dtype of h, an NF4Tensor, or None"
    ):
        lockin_fast.latent_stats(p.h, p.weight, p.bias, h_ref=[0.0])


MEMORY = """
tokens, width, latents = map(int, sys.argv[1:4])
dtype, weight_dtype = getattr(torch, sys.argv[4]), getattr(torch, sys.argv[5])
torch.manual_seed(0)
weight = torch.empty(latents, width, dtype=weight_dtype)
for part in weight.split(1024):
    part.normal_()
h, bias = torch.randn(tokens, width).to(dtype), torch.zeros(latents)
h_ref = h + 1
mask = torch.ones(tokens, dtype=torch.bool)
lockin_fast.latent_stats(h[:64], weight[:64], bias[:64], h_ref=h_ref[:64], mask=mask[:64])
stats, risen = rise(lambda: lockin_fast.latent_stats(h, weight, bias, h_ref=h_ref, mask=mask))
outputs = sum(getattr(stats, n).nbytes for n in ("sum", "sum_squares", "count", "count_ref")) / 2**20
print(risen - outputs)
"""


def scratch_mb(*arguments, **environment):
    (megabytes,) = printed(MEMORY, *arguments, **environment)
    return float(megabytes)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "latents"),
    [
        # [T, F] would be 64 MB for each stream, before anything is done with it.
        ("float32", "float32", 8192),
        ("bfloat16", "bfloat16", 8192),
        # The weight in h's dtype would be 96 MB.
        ("float32", "bfloat16", 98304),
        ("bfloat16", "float32", 196608),
    ],
)
def test_scratch_memory(dtype, weight_dtype, latents):
    tokens = 2048 if dtype == weight_dtype else 64
    assert scratch_mb(tokens, 256, latents, dtype, weight_dtype, OMP_NUM_THREADS="1") < 64


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scratch_memory_at_full_size(dtype):
    assert scratch_mb(4096, 2048, 65536, dtype, dtype) < 64
