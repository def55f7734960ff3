import math
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from memory import printed
from penalty_oracle import assert_as_good_as_torch
from threads import on_threads
from torch._subclasses.fake_tensor import FakeTensorMode

import lockin_fast
from lockin_fast.ops.js_divergence import reference

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1, 1), (2, 3, 2), (3, 5, 123), (13, 2, 48), (8, 4, 1000), (40, 2, 300), (5, 2, 2304), (2, 3, 20487)]
EPS = torch.finfo(torch.float32).eps


def logits_of(n, positions, vocabulary, dtype, seed=0):
    """Peaked distributions that share some of their mass, with tokens banned here and there."""
    make = torch.Generator().manual_seed(seed)
    common = torch.randn(positions, vocabulary, generator=make)
    x = 3 * (common + torch.randn(n, positions, vocabulary, generator=make))
    banned = torch.rand(n, positions, vocabulary, generator=make) < 0.1
    banned[:, :, 0] = False
    return x.masked_fill(banned, -torch.inf).to(dtype)


def plain(x, weights=None):
    """The formula written out in x's dtype, over all probabilities at once."""
    share = torch.full((x.shape[0],), 1.0) if weights is None else weights
    share = (share / share.sum()).to(x.dtype).view(-1, *[1] * (x.dim() - 1))
    p = x.softmax(-1)
    mean = (share * p).sum(0)
    return (share * (torch.xlogy(p, p) - torch.xlogy(p, mean))).sum((0, -1)) / math.log(2)


def rounding(exact):
    """What rounded probabilities may change: a term m t^2 / 2 with t = p / m - 1 errs by m t dt, dt a few ulps."""
    return 16 * EPS * (exact + (2 * exact / math.log(2)).sqrt()) + 1e-13


@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_as_good_as_plain_torch(dtype, shape, weighted, poisoned_memory):
    x = logits_of(*shape, dtype)
    weights = torch.rand(shape[0], generator=torch.Generator().manual_seed(1)) + 0.1 if weighted else None
    bits = lockin_fast.js_divergence(x, weights=weights)
    truth, yardstick = plain(x.double(), weights), plain(x.float(), weights)
    assert bits.dtype is torch.float32
    assert_as_good_as_torch("bits", bits, truth, yardstick)
    assert_as_good_as_torch("reference", reference(x, None), plain(x.double()), plain(x.float()))


@pytest.mark.parametrize("difference", [1.0, 1e-2, 1e-4, 1e-6])
def test_nearly_equal_distributions_keep_their_divergence(difference):
    make = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(1, 4, 1500, generator=make) + difference * torch.randn(8, 4, 1500, generator=make)
    log_p = x.double().log_softmax(-1)
    log_mean = log_p.logsumexp(0) - math.log(8)
    log_r = log_p - log_mean
    exact = (log_mean.exp() * (log_r * log_r.exp() - torch.expm1(log_r))).sum(-1).mean(0) / math.log(2)
    error = (lockin_fast.js_divergence(x).double() - exact).abs()
    assert (error <= rounding(exact)).all(), (error / exact).tolist()
    if difference <= 1e-4:  # what a difference of entropies in fp32 leaves is noise
        p = x.softmax(-1)
        plain_error = (torch.xlogy(p, p).sum(-1).mean(0) - torch.xlogy(p.mean(0), p.mean(0)).sum(-1)) / math.log(2)
        assert ((plain_error - exact).abs() > 10 * error).any()


@pytest.mark.parametrize("count", [32, 4096])
def test_two_tokens_in_closed_form(count):
    # Every pair of probabilities from 1e-35 to 1 / 2: the exponential, and the logarithm of ratios from 0 to 2.
    a, b = torch.linspace(-80, 0, count), torch.linspace(-80, 0, count)[torch.randperm(count)]
    x = torch.stack([torch.stack([torch.zeros(count), a], -1), torch.stack([torch.zeros(count), b], -1)])
    exact = plain(x.double())
    error = (lockin_fast.js_divergence(x).double() - exact).abs()
    assert (error <= rounding(exact)).all(), (error - rounding(exact)).max()


def test_moderate_differences_are_right_to_a_few_ulps_and_without_bias():
    odds = torch.linspace(1.3, 9.0, 200).log()
    zero = torch.zeros(200)
    x = torch.stack([torch.stack([zero, zero], -1), torch.stack([odds, zero], -1)])
    exact = plain(x.double())
    error = (lockin_fast.js_divergence(x).double() - exact) / exact
    assert error.abs().max() < 16 * EPS and error.mean().abs() < EPS


def test_by_hand():
    banned = -torch.inf
    disjoint = torch.full((4, 4), banned).fill_diagonal_(7.0)
    assert lockin_fast.js_divergence(disjoint).item() == 2.0
    half = torch.tensor([[0.0, 0.0, banned], [banned, 0.0, 0.0]])  # mean 1/4 1/2 1/4: 1.5 bits less 1
    torch.testing.assert_close(lockin_fast.js_divergence(half).item(), 0.5, rtol=4 * EPS, atol=0)
    same = torch.randn(1, 3, 500).expand(7, -1, -1)
    assert (lockin_fast.js_divergence(same) < 1e-12).all()
    assert lockin_fast.js_divergence(torch.randn(5, 1)).item() == 0.0
    assert lockin_fast.js_divergence(torch.randn(1, 9, 30)).tolist() == [0.0] * 9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [7, 64, 1500, 4096 + 2304])
def test_logits_in_rising_or_falling_order(vocabulary, dtype):
    x = torch.linspace(-40, 40, vocabulary).to(dtype)
    x = torch.stack([x, x.flip(0), x.roll(vocabulary // 3), torch.zeros_like(x)])[:, None]
    assert_as_good_as_torch("bits", lockin_fast.js_divergence(x), plain(x.double()), plain(x.float()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_banned_tokens_are_as_if_they_were_not_there(dtype):
    x = logits_of(3, 2, 150, dtype)
    for vocabulary, place in ((151, slice(0, 150)), (1500, slice(1350, 1500)), (4500, slice(2200, 2350))):
        wide = torch.full((3, 2, vocabulary), -torch.inf, dtype=dtype)
        wide[..., place] = x
        assert_as_good_as_torch("bits", lockin_fast.js_divergence(wide), plain(x.double()), plain(x.float()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("column", [0, 40, 63, 64, 129])
def test_nan_and_inf_reach_their_position_alone(column, dtype):
    x = logits_of(2, 3, 130, dtype)
    clean = lockin_fast.js_divergence(x)
    for bad in (torch.nan, torch.inf):
        spoilt = x.clone()
        spoilt[1, 2, column] = bad
        bits = lockin_fast.js_divergence(spoilt)
        assert bits[2].isnan() and torch.equal(bits[:2], clean[:2])
    spoilt = x.clone()
    spoilt[0, 1] = -torch.inf
    assert lockin_fast.js_divergence(spoilt)[1].isnan() and spoilt[0, 1].softmax(0).isnan().all()
    only = torch.full_like(x, -torch.inf)
    only[:, :, column] = torch.nan
    assert lockin_fast.js_divergence(only).isnan().all()


def test_huge_and_tiny_logits():
    x = torch.tensor([[1e30, -1e30, 3.0], [-1e30, 1e30, 5.0]])
    assert lockin_fast.js_divergence(x).item() == 1.0
    x = torch.zeros(2, 5000)
    x[0, 3] = x[1, 4500] = 1000.0
    assert lockin_fast.js_divergence(x).item() == 1.0
    x = torch.tensor([[1e-40, 0.0, -1e-42], [0.0, 0.0, 0.0]])
    assert lockin_fast.js_divergence(x).item() < 1e-12
    x = torch.tensor([[0.0, -87.0, -100.0, -1000.0], [0.0, -1000.0, -86.0, -103.0]])
    assert 0 <= lockin_fast.js_divergence(x).item() < 1e-12


def test_weights():
    x = logits_of(2, 3, 200, torch.float32)
    twice = lockin_fast.js_divergence(torch.cat([x, x[:1]]))
    for scale in (1.0, 1e-3, 512.0):
        weighted = lockin_fast.js_divergence(x, weights=torch.tensor([2.0, 1.0]) * scale)
        torch.testing.assert_close(weighted, twice, rtol=16 * EPS, atol=1e-7)
    spoilt = torch.cat([x, torch.full_like(x[:1], torch.nan), -torch.inf + x[:1]])
    left_out = lockin_fast.js_divergence(spoilt, weights=torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(left_out, lockin_fast.js_divergence(x), rtol=4 * EPS, atol=0)
    assert lockin_fast.js_divergence(x, weights=torch.tensor([torch.nan, 1.0])).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_leading_dimensions(dtype):
    x = logits_of(2, 4, 123, dtype)
    bits = lockin_fast.js_divergence(x)
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    longer = torch.cat([torch.full_like(x, torch.nan), x], 1)[:, 4:]
    wider = torch.stack([x, x], -1)[..., 0]
    for same in (transposed, longer, wider, x.view(2, 2, 2, 123), x.view(2, 2, 1, 2, 123)):
        again = lockin_fast.js_divergence(same)
        assert again.shape == same.shape[1:-1] and torch.equal(again.view(-1), bits)
    for s in range(4):
        one = lockin_fast.js_divergence(x[:, s])
        assert one.shape == () and torch.equal(one, bits[s])
    assert lockin_fast.js_divergence(x[:, :0]).shape == (0,)
    assert lockin_fast.js_divergence(x.view(2, 2, 2, 123)[:, :, :0]).shape == (2, 0)


def test_threads_change_nothing():
    # bf16, which triton's interpreter leaves to the reference: two threads at once crash it.
    x = logits_of(3, 33, 700, torch.bfloat16)
    bits = lockin_fast.js_divergence(x)
    with ThreadPoolExecutor(2) as pool:
        assert all(torch.equal(bits, again) for again in pool.map(lockin_fast.js_divergence, [x] * 4))
    for threads in (1, 3):
        with on_threads(threads):
            assert torch.equal(bits, lockin_fast.js_divergence(x))


def test_no_gradient_is_recorded():
    x = logits_of(2, 3, 20, torch.float32).requires_grad_()
    assert not lockin_fast.js_divergence(x).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(dtype):
    op = torch.ops.lockin_fast.js_divergence.default
    x = logits_of(3, 5, 48, dtype)
    for weights in (None, torch.tensor([0.5, 0.25, 0.25])):
        torch.library.opcheck(op, (x, weights), test_utils=CHECKS)


def test_traces_as_one_graph_and_waits_for_nothing():
    torch._dynamo.reset()

    def both(x, weights):
        return lockin_fast.js_divergence(x), lockin_fast.js_divergence(x * 2, weights=weights)

    x, weights = logits_of(3, 5, 48, torch.float32), torch.tensor([1.0, 2.0, 3.0])
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weights), both(x, weights))
    with FakeTensorMode(allow_non_fake_inputs=False):
        bits = lockin_fast.js_divergence(torch.empty(3, 5, 48, dtype=torch.bfloat16), weights=torch.empty(3))
        assert bits.shape == (5,) and bits.dtype is torch.float32


def test_errors_name_the_argument():
    x = torch.zeros(3, 5, 48)
    for bad, error, text in (
        ([0.0], TypeError, r"^logits: got list, expected a tensor \[n, ..., V\]"),
        (x.double(), TypeError, "^logits: got torch.float64, expected float32, float16 or bfloat16; cast it"),
        (x[0, 0], ValueError, r"^logits: got shape \(48,\), expected \[n, ..., V\] with at least one prompt and one"),
        (x[:0], ValueError, r"^logits: got shape \(0, 5, 48\)"),
        (x[..., :0], ValueError, r"^logits: got shape \(3, 5, 0\)"),
    ):
        with pytest.raises(error, match=text):
            lockin_fast.js_divergence(bad)
    for weights, error, text in (
        ([1.0, 1.0, 1.0], TypeError, r"^weights: got list, expected a tensor \[3\], one weight per prompt, or None"),
        (torch.ones(5), ValueError, r"^weights: got torch.float32 \(5,\), expected floating point \[3\]"),
        (torch.ones(3, dtype=torch.int64), ValueError, r"^weights: got torch.int64 \(3,\)"),
        (torch.tensor([2.0, -1.0, 0.0]), ValueError, r"^weights: got \[2.0, -1.0, 0.0\], expected none below"),
        (torch.zeros(3), ValueError, r"^weights: got \[0.0, 0.0, 0.0\], expected none below 0 and not all of them 0"),
        (torch.ones(3, device="meta"), ValueError, "^weights: is on meta, but logits is on cpu; move it there"),
    ):
        with pytest.raises(error, match=text):
            lockin_fast.js_divergence(x, weights=weights)


MEMORY = """
x = torch.zeros(8, 16, 128256, dtype=torch.bfloat16)
lockin_fast.js_divergence(x[:, :2])
_, risen = rise(lambda: lockin_fast.js_divergence(x))
print(risen, next(r.backend for r in lockin_fast.backends() if r.op == "js_divergence"))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_scratch_memory():
    megabytes, backend = printed(MEMORY, OMP_NUM_THREADS="1")
    row = 4 * 128256 / 2**20  # in fp32; the reference holds the cluster's rows of one position, in fp64
    assert float(megabytes) < (row if backend == "cpu" else 8 * 2 * 8 * row)
