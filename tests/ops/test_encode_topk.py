import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from memory import printed
from penalty_oracle import assert_as_good_as_torch, clear_of_steps, encode, problem
from threads import on_threads
from torch._subclasses.fake_tensor import FakeTensorMode

import lockin_fast
from lockin_fast import EncodedTopK
from lockin_fast.ops import _wide
from lockin_fast.ops import encode_topk as op_module

op = torch.ops.lockin_fast.encode_topk.default
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 48, 1, 1), (70, 123, 13, 5), (33, 2304, 100, 64), (37, 48, 123, 123), (3, 4096, 90, 20), (5, 1, 2, 1)]


def whole(z, k):
    """The k largest of z [T, F]: a stable sort keeps equal values in the order of their indices, and puts NaN first."""
    values, indices = z.sort(dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


def small_integers(tokens, width, latents, dtype, seed=0):
    """Operands whose products and sums are exact in every dtype and order, with many equal values among them."""
    make = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randint(-2, 3, shape, generator=make).float()

    return draw(tokens, width).to(dtype), draw(latents, width).to(dtype), draw(latents)


def exact(h, weight, bias, threshold=None):
    pre = h.double() @ weight.double().t() + bias.double()
    return (pre.relu() if threshold is None else pre.relu() * (pre > threshold)).float()


def assert_exact(found, expected):
    for name, ours, truth in zip(EncodedTopK._fields, found, expected, strict=True):
        wrong = (ours != truth) & ~(ours.isnan() & truth.isnan())
        first = wrong.nonzero()[:1].tolist()
        assert not wrong.any(), f"{name}{first}: got {ours[wrong][0]}, expected {truth[wrong][0]}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_order_and_indices_are_those_of_a_stable_sort(dtype, shape, poisoned_memory):
    *sizes, k = shape
    h, weight, bias = small_integers(*sizes, dtype)
    found = lockin_fast.encode_topk(h, weight, bias, k)
    assert found.values.dtype is torch.float32 and found.indices.dtype is torch.int64
    assert_exact(found, whole(exact(h, weight, bias), k))
    threshold = torch.arange(sizes[2]).remainder(7) - 2.0  # met exactly by some, and the comparison is strict
    assert_exact(
        lockin_fast.encode_topk(h, weight, bias, k, threshold=threshold), whole(exact(h, weight, bias, threshold), k)
    )


@pytest.mark.parametrize("threshold", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_as_good_as_plain_torch(dtype, shape, threshold):
    *sizes, k = shape
    p = problem(*sizes, dtype, ref=None, threshold=threshold)
    usable = clear_of_steps(p).all(1)
    assert usable.any()
    values, indices = lockin_fast.encode_topk(p.h, p.weight, p.bias, k, threshold=p.threshold)
    z, yardstick = (encode(q, q.h) for q in (p.at(torch.float64), p.at(torch.float32)))
    usable = usable[:, None].expand(values.shape)
    # As close as the largest are, whichever of two near-equal ones comes first; and they belong to their indices.
    assert_as_good_as_torch("values", values, whole(z, k)[0], whole(yardstick, k)[0], usable)
    assert_as_good_as_torch("latents", values, z.gather(1, indices), yardstick.gather(1, indices), usable)
    assert (indices.sort(1).values.diff(dim=1) > 0).all() and (values.diff(dim=1) <= 0).all()


def test_many_latents_beside_few_kept():
    h, weight, bias = small_integers(9, 16, 3001, torch.float32)
    for k in (1, 2, 65):
        assert_exact(lockin_fast.encode_topk(h, weight, bias, k), whole(exact(h, weight, bias), k))
    # Rising and falling values: every latent displaces one, or none does.
    bias = torch.arange(3001.0)
    for order in (bias, -bias):
        assert_exact(
            lockin_fast.encode_topk(h, weight * 0, order + 1000, 7), whole((order + 1000).relu().expand(9, -1), 7)
        )


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="too many tokens for triton's interpreter")
def test_more_tokens_than_are_kept_at_a_time():
    h = torch.where(torch.rand(110_000, 1, generator=torch.Generator().manual_seed(0)) < 0.5, 1.0, -1.0)
    found = lockin_fast.encode_topk(h, torch.arange(1.0, 41.0)[:, None], torch.zeros(40), 40)
    rising = torch.arange(40)
    assert torch.equal(found.indices, torch.where(h > 0, rising.flip(0), rising))
    assert torch.equal(found.values, torch.where(h > 0, rising.flip(0) + 1.0, 0.0))


def test_fewer_latents_on_than_kept_are_filled_up_with_the_first_that_are_off():
    bias = torch.full((50,), -1.0)
    bias[20], bias[3] = 2.0, 5.0
    values, indices = lockin_fast.encode_topk(torch.zeros(4, 48), torch.zeros(50, 48), bias, 6)
    assert values.tolist() == [[5.0, 2.0, 0.0, 0.0, 0.0, 0.0]] * 4
    assert indices.tolist() == [[3, 20, 0, 1, 2, 4]] * 4
    # Off is off: a negative zero does not come after the positive ones.
    values, indices = lockin_fast.encode_topk(torch.zeros(4, 48), torch.zeros(50, 48), bias.fill_(-0.0), 3)
    assert indices.tolist() == [[0, 1, 2]] * 4 and not values.signbit().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_largest_then_infinity(dtype, poisoned_memory):
    h, weight, bias = small_integers(6, 48, 90, dtype)
    h[2, 5] = torch.nan
    bias[7], bias[60] = torch.inf, torch.nan
    h[4, 3] = torch.inf
    found = lockin_fast.encode_topk(h, weight, bias, 8)
    assert_exact(found, whole(exact(h, weight, bias), 8))
    assert found.values[2].isnan().all() and found.indices[2].tolist() == list(range(8))
    assert found.indices[0, :2].tolist() == [60, 7] and found.values[0, 2:].isfinite().all()
    negative = -torch.full((90,), torch.nan)
    assert lockin_fast.encode_topk(h, weight, negative, 3).indices[0].tolist() == [0, 1, 2]
    negative[:50] = torch.nan
    assert lockin_fast.encode_topk(h, weight, negative, 60).indices[0].tolist() == list(range(60))


def test_nan_is_found_where_nothing_else_is_large_enough():
    h, weight, bias = small_integers(6, 48, 200, torch.float32)
    bias[100:] = -1e4
    bias[[130, 199]] = torch.nan
    found = lockin_fast.encode_topk(h, weight, bias, 8)
    assert_exact(found, whole(exact(h, weight, bias), 8))
    assert found.indices[:, :2].tolist() == [[130, 199]] * 6


@pytest.mark.parametrize("scale", [2.0**100, 2.0**-100, 2.0**-140], ids=["huge", "tiny", "denormal"])
def test_huge_and_tiny_values(scale):
    h, weight, bias = small_integers(6, 48, 90, torch.float32)
    z = exact(h, weight, 0 * bias)
    assert_exact(lockin_fast.encode_topk(h, weight * scale, 0 * bias, 20), whole(z * scale, 20))


@pytest.mark.parametrize(("tokens", "latents", "k"), [(0, 5, 3), (4, 0, 0), (0, 0, 0), (4, 5, 0)])
def test_nothing_to_do(tokens, latents, k):
    p = problem(tokens, 48, latents, torch.float32)
    values, indices = lockin_fast.encode_topk(p.h, p.weight, p.bias, k)
    assert values.shape == indices.shape == (tokens, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_leading_dimensions_strides_and_weight_dtype(dtype):
    h, weight, bias = small_integers(12, 48, 20, dtype)
    expected = lockin_fast.encode_topk(h, weight, bias, 5)
    shaped = lockin_fast.encode_topk(h.view(3, 4, 48), weight.double(), bias.double(), 5)
    assert shaped.values.shape == (3, 4, 5)
    assert_exact((x.view(12, 5) for x in shaped), expected)
    assert_exact(lockin_fast.encode_topk(h.t().contiguous().t(), weight.t().contiguous().t(), bias, 5), expected)
    assert_exact(lockin_fast.encode_topk(h.repeat(1, 2)[:, :48], weight, bias, 5), expected)
    one = lockin_fast.encode_topk(h[3], weight, bias, 5)
    assert one.values.shape == (5,) and torch.equal(one.indices, expected.indices[3])


@pytest.mark.parametrize("k", [4, 77])
def test_tiles_and_parts_change_nothing(k, monkeypatch):
    h, weight, bias = small_integers(130, 48, 77, torch.float32)
    expected = whole(exact(h, weight, bias), k)
    assert_exact(op_module.reference(h, weight, bias, None, k), expected)
    monkeypatch.setattr(_wide, "OPERAND_ELEMENTS", 48 * 50)
    monkeypatch.setattr(_wide, "PRODUCT_ELEMENTS", 1000)
    assert_exact(op_module.reference(h, weight, bias, None, k), expected)
    monkeypatch.setattr(_wide, "CAST_ELEMENTS", 48 * 10)
    assert_exact(lockin_fast.encode_topk(h, weight.double(), bias, k), expected)
    threshold = torch.full((77,), 2.0)
    assert_exact(
        lockin_fast.encode_topk(h, weight.double(), bias, k, threshold=threshold),
        whole(exact(h, weight, bias, threshold), k),
    )


def test_threads_change_nothing():
    p = problem(50, 48, 700, torch.bfloat16, threshold=True)

    def run(_=None):
        return lockin_fast.encode_topk(p.h, p.weight, p.bias, 9, threshold=p.threshold)

    expected = run()
    for threads in (1, 2, 5):
        with on_threads(threads):
            assert_exact(run(), expected)
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(run, range(4)):
            assert_exact(found, expected)


def test_no_gradient():
    p = problem(6, 48, 4, torch.float32)
    assert not lockin_fast.encode_topk(p.h.requires_grad_(), p.weight, p.bias, 2).values.requires_grad


def test_errors_name_the_argument():
    p = problem(6, 48, 4, torch.float32)
    for k, error, text in (
        (5, ValueError, "^k: got 5, expected 0 to 4, the number of latents"),
        (-1, ValueError, "^k: got -1"),
        (2.0, TypeError, "^k: got float, expected an int"),
        (True, TypeError, "^k: got bool"),
    ):
        with pytest.raises(error, match=text):
            lockin_fast.encode_topk(p.h, p.weight, p.bias, k)
    with pytest.raises(ValueError, match=r"^h: got shape \(6, 47\)"):
        lockin_fast.encode_topk(p.h[:, :47], p.weight, p.bias, 2)
    with pytest.raises(TypeError, match="^h: got torch.float64"):
        lockin_fast.encode_topk(p.h.double(), p.weight, p.bias, 2)
    with pytest.raises(ValueError, match=r"^bias: got shape \(3,\)"):
        lockin_fast.encode_topk(p.h, p.weight, p.bias[:3], 2)
    with pytest.raises(ValueError, match=r"^threshold: got shape \(5,\)"):
        lockin_fast.encode_topk(p.h, p.weight, p.bias, 2, threshold=torch.zeros(5))
    with pytest.raises(ValueError, match="^weight: is on meta, but h is on cpu"):
        lockin_fast.encode_topk(p.h, p.weight.to("meta"), p.bias, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("threshold", [False, True])
def test_opcheck(dtype, threshold):
    p = problem(9, 48, 7, dtype, threshold=threshold)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, (p.h, p.weight, p.bias, p.threshold, 3), test_utils=checks)


@pytest.mark.parametrize("dynamic", [False, True])
def test_whole_graph_compiles_and_agrees(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(lockin_fast.encode_topk, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (9, 17):
        p = problem(tokens, 48, 20, torch.float32, threshold=True)
        for weight in (p.weight, p.weight.double()):
            arguments = p.h, weight, p.bias, 4
            assert_exact(
                compiled(*arguments, threshold=p.threshold),
                lockin_fast.encode_topk(*arguments, threshold=p.threshold),
            )


def test_nothing_waits_for_the_device():
    with FakeTensorMode(allow_non_fake_inputs=False):
        h, weight = torch.empty(3, 9, 48, dtype=torch.bfloat16), torch.empty(20, 48)
        values, indices = lockin_fast.encode_topk(h, weight, torch.empty(20), 4, threshold=torch.empty(20))
        assert values.shape == indices.shape == (3, 9, 4)
        assert values.dtype is torch.float32 and indices.dtype is torch.int64


MEMORY = """
tokens, width, latents, k = map(int, sys.argv[1:5])
dtype, weight_dtype = getattr(torch, sys.argv[5]), getattr(torch, sys.argv[6])
weight = torch.empty(latents, width, dtype=weight_dtype)
for part in weight.split(1024):
    part.normal_()
h, bias = torch.randn(tokens, width).to(dtype), torch.zeros(latents)
lockin_fast.encode_topk(h[:64], weight[:64], bias[:64], 8)
(values, indices), risen = rise(lambda: lockin_fast.encode_topk(h, weight, bias, k))
print(risen - (values.nbytes + indices.nbytes) / 2**20)
"""


def scratch_mb(*arguments):
    (megabytes,) = printed(MEMORY, *arguments, OMP_NUM_THREADS="2")
    return float(megabytes)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("tokens", "latents", "dtype", "weight_dtype"),
    [
        # [T, F] would be 64 MB in fp32; the weight in h's dtype 96 MB.
        (2048, 8192, "bfloat16", "bfloat16"),
        (64, 196608, "bfloat16", "float32"),
    ],
)
def test_scratch_memory(tokens, latents, dtype, weight_dtype):
    assert scratch_mb(tokens, 256, latents, 64, dtype, weight_dtype) < 64


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "") in ("", "0"), reason="a test of the interpreted kernel")
def test_slabs_of_the_triton_kernel_change_nothing_and_what_it_cannot_hold_falls_back(monkeypatch):
    from lockin_fast.kernels.triton import encode_topk as kernel

    h, weight, bias = small_integers(70, 48, 77, torch.float32)
    threshold = torch.arange(77).remainder(7) - 2.0
    monkeypatch.setattr(kernel, "ROWS", 40)
    monkeypatch.setattr(kernel, "COLUMNS", 30)
    for k in (1, 9, 29, 31, 77):  # fewer and more than a slab has
        found = lockin_fast.encode_topk(h, weight, bias, k, threshold=threshold)
        assert_exact(found, whole(exact(h, weight, bias, threshold), k))
    monkeypatch.setattr(kernel, "MOST", 8)
    assert_exact(lockin_fast.encode_topk(h, weight, bias, 9), whole(exact(h, weight, bias), 9))
    row = next(r for r in lockin_fast.backends() if (r.op, r.device) == ("encode_topk", "cpu"))
    assert row.fallbacks["more than 8 latents of a token do not fit in registers"] == 1
