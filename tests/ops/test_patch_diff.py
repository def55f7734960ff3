import os
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import pytest
import torch
from penalty_oracle import assert_as_good_as_torch
from threads import on_threads

from lockin_fast import patch_diff, quantize_nf4

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# tokens of h, positions, width, latents
SHAPES = [
    (1, 1, 1, 1),
    (9, 5, 48, 13),
    (40, 37, 123, 20),
    (12, 6, 2304, 100),
    (5, 3, 4096, 20),
    (6, 4, 48, 0),
    (6, 0, 48, 3),
]


def inputs(tokens, positions, width, latents, dtype, seed=0):
    make = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, width, generator=make).to(dtype)
    rows = torch.randint(0, tokens, (positions,), generator=make)
    source = (h[rows].float() + 0.5 * torch.randn(positions, width, generator=make)).to(dtype)
    weight = (torch.randn(latents, width, generator=make) / width**0.5).to(dtype)
    return h, rows, source, weight, torch.randn(latents, generator=make) * 0.3


def by_formula(h, rows, source, weight, bias, threshold=None, work=torch.float64):
    """norm, projection, pre-activations before and after."""
    h, source, weight, bias = (x.to(work) for x in (h, source, weight, bias))
    diff = source - h[rows]
    return diff.norm(dim=1), diff @ weight.t(), h[rows] @ weight.t() + bias, source @ weight.t() + bias


def latent(pre, threshold=None):
    return pre.relu() if threshold is None else pre.relu() * (pre > threshold.to(pre.dtype))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_good_as_plain_torch(dtype, shape, gated, poisoned_memory):
    h, rows, source, weight, bias = inputs(*shape, dtype)
    threshold = torch.linspace(0.1, 0.4, shape[3]) if gated else None
    got = patch_diff(h, rows, source, weight, bias, threshold=threshold)
    true = by_formula(h, rows, source, weight, bias)
    plain = by_formula(h, rows, source, weight, bias, work=torch.float32)
    assert_as_good_as_torch("norm", got.norm, true[0], plain[0])
    assert_as_good_as_torch("projection", got.projection, true[1], plain[1])
    step = threshold if gated else 0.0
    clear = ((true[2] - step).abs() > 1e-4) & ((true[3] - step).abs() > 1e-4)
    assert clear.float().mean() > 0.9 or not clear.numel()
    change, yardstick = (latent(x[3], threshold) - latent(x[2], threshold) for x in (true, plain))
    assert_as_good_as_torch("latents", got.latents, change, yardstick, clear)
    alone = patch_diff(h, rows, source, weight)
    assert alone.latents is None
    assert torch.equal(alone.norm, got.norm) and torch.equal(alone.projection, got.projection)


def test_by_hand():
    h = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    source = torch.tensor([[6.0, 0.0]])
    weight, bias = torch.tensor([[1.0, 1.0], [-1.0, 0.0]]), torch.tensor([-5.0, 4.0])
    got = patch_diff(h, torch.tensor([[0, 1]]), source, weight, bias)
    assert got.norm.tolist() == [5.0]
    assert got.projection.tolist() == [[-1.0, -3.0]]
    assert got.latents.tolist() == [[1.0 - 2.0, 0.0 - 1.0]]


def test_a_small_difference_of_large_states_keeps_its_precision():
    h, rows, source, weight, bias = inputs(20, 16, 2304, 20, torch.float32)
    h, source = h * 1e4, h[rows] * 1e4 + source
    got = patch_diff(h, rows, source, weight, bias)
    torch.testing.assert_close(
        got.projection.double(), by_formula(h, rows, source, weight, bias)[1], rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-42])
def test_norms_of_any_size(scale):
    h, rows = torch.zeros(3, 123), torch.tensor([2, 0])
    source = torch.randn(2, 123) * scale
    norm = patch_diff(h, rows, source, torch.zeros(1, 123)).norm
    torch.testing.assert_close(norm.double(), source.double().norm(dim=1), rtol=1e-6, atol=1e-45)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_stay_in_their_position(dtype):
    h, rows, source, weight, bias = inputs(20, 11, 48, 5, dtype)
    rows = torch.arange(11)
    h[2, 7], source[5, 0], source[9, 1] = torch.nan, torch.nan, torch.inf
    got = patch_diff(h, rows, source, weight, bias)
    bad = torch.zeros(11, dtype=torch.bool)
    bad[[2, 5, 9]] = True
    assert torch.equal(got.norm.isfinite(), ~bad) and torch.equal(got.projection.isfinite().all(1), ~bad)
    assert got.norm[9] == torch.inf and got.norm[[2, 5]].isnan().all()
    assert got.latents[[2, 5]].isnan().all() and got.latents[~bad].isfinite().all()


def test_a_row_outside_of_h_gives_nan_in_the_op_and_is_refused_by_the_function():
    h, rows, source, weight, bias = inputs(6, 5, 48, 3, torch.float32)
    expected = patch_diff(h, rows, source, weight, bias)
    outside = rows.clone()
    outside[1], outside[4] = -1, 6
    got = torch.ops.lockin_fast.patch_diff.default(h, outside, source, weight, bias, None)
    for x, right in zip(got, expected, strict=True):
        assert x[[1, 4]].isnan().all()
        torch.testing.assert_close(x[[0, 2, 3]], right[[0, 2, 3]])
    none = torch.ops.lockin_fast.patch_diff.default(h[:0], rows, source, weight, bias, None)
    assert all(x.isnan().all() for x in none)
    with pytest.raises(ValueError, match="positions: got 6, expected 0 to 5"):
        patch_diff(h, outside.abs(), source, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_casts(dtype):
    h, rows, source, weight, bias = inputs(12, 7, 48, 5, dtype)
    expected = patch_diff(h, rows, source, weight, bias)
    memory = torch.zeros(3, 6, 50, dtype=dtype)
    view = memory[:, 1:5, 2:]
    view.copy_(h.view(3, 4, 48))
    pairs = torch.stack((rows // 4, rows % 4), 1)
    other = source.t().contiguous().t(), weight.t().contiguous().t(), bias.double()
    for a, b in zip(patch_diff(view, pairs, *other), expected, strict=True):
        torch.testing.assert_close(a, b)
    apart = torch.cat((source, source), 1)[:, :48]
    for a, b in zip(patch_diff(h, rows, apart, weight, bias), expected, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(patch_diff(h.t().contiguous().t(), rows, source, weight, bias), expected, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(patch_diff(h, rows, source.double(), weight.double(), bias), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="triton's interpreter is not for two threads")
def test_two_threads_at_once_and_any_number_of_threads():
    cases = [inputs(90, 80, 2304, 13, torch.bfloat16, seed) for seed in range(4)]
    expected = [patch_diff(*case) for case in cases]
    with ThreadPoolExecutor(2) as pool:
        for got, right in zip(pool.map(lambda case: patch_diff(*case), cases), expected, strict=True):
            assert all(map(torch.equal, got, right))
    for threads in (1, 3):
        with on_threads(threads):
            assert all(map(torch.equal, patch_diff(*cases[0]), expected[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_nf4_source_is_decoded_in_blocks(dtype, monkeypatch):
    h, rows, source, weight, bias = inputs(20, 11, 64, 5, dtype)
    packed = quantize_nf4(source, outliers=2)
    expected = patch_diff(h, rows, packed.dequantize(dtype), weight, bias)
    monkeypatch.setattr(import_module("lockin_fast.ops.patch_diff"), "DECODED_ELEMENTS", 64 * 4)
    for a, b in zip(patch_diff(h, rows, packed, weight, bias), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert patch_diff(h, rows, packed, weight).latents is None
    assert patch_diff(h, rows[:0], packed.rows(slice(0)), weight, bias).latents.shape == (0, 5)


H, ROWS, SOURCE = torch.zeros(2, 3, 48), torch.tensor([[0, 1]]), torch.zeros(1, 48)
WEIGHT, BIAS = torch.zeros(4, 48), torch.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((H.double(), ROWS, SOURCE, WEIGHT), {}, TypeError, "h: got torch.float64"),
        ((H, ROWS.int(), SOURCE, WEIGHT), {}, TypeError, "positions: got torch.int32"),
        ((H, ROWS, SOURCE[:0], WEIGHT), {}, ValueError, r"source: got torch.float32 \(0, 48\)"),
        ((H, ROWS, SOURCE, WEIGHT.t()), {}, ValueError, "weight: got .*transpose"),
        ((H, ROWS, SOURCE, WEIGHT, BIAS[:3]), {}, ValueError, r"bias: got shape \(3,\)"),
        ((H, ROWS, SOURCE, WEIGHT, BIAS), {"threshold": BIAS[:3]}, ValueError, r"threshold: got shape \(3,\)"),
        ((H, ROWS, SOURCE, WEIGHT), {"threshold": BIAS}, ValueError, "threshold: got one without a bias"),
        ((H, ROWS, SOURCE, WEIGHT.to("meta")), {}, ValueError, "weight: is on meta"),
    ],
)
def test_wrong_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        patch_diff(*arguments, **options)
