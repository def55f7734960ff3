import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from memory import printed
from penalty_oracle import assert_as_good_as_torch
from threads import on_threads
from torch._subclasses.fake_tensor import FakeTensorMode

import lockin_fast
from lockin_fast.ops.prefix_matching import reference, repeated

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [  # B, H, Hkv, T, D
    (1, 1, 1, 2, 1), (2, 4, 2, 77, 16), (1, 2, 1, 130, 33), (1, 3, 3, 200, 64), (2, 2, 1, 49, 123), (1, 1, 1, 96, 256),
    (1, 2, 2, 64, 300), (3, 1, 1, 65, 2), (1, 2, 1, 1100, 64),
]  # fmt: skip
EPS = torch.finfo(torch.float32).eps


def problem(batch, heads, groups, length, width, dtype, seed=0):
    """Random queries and keys, and tokens that occur about three times each."""
    make = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(batch, heads, length, width, generator=make)
    k = torch.randn(batch, groups, length, width, generator=make)
    tokens = torch.randint(0, max(length // 3, 1), (batch, length), generator=make)
    tokens[:, -1] = tokens[:, 0]
    return q.to(dtype), k.to(dtype), tokens


def stripe(tokens):
    """bool [B, T, T] by the definition: j <= t and tokens[j - 1] == tokens[t]."""
    same = tokens[:, :, None] == tokens[:, None, :]
    after = torch.zeros_like(same)
    after[:, :, 1:] = same[:, :, :-1]
    return after.tril()


def plain(q, k, tokens, scale=None):
    """The whole attention matrix, in q's dtype."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = (q @ k.mT) * (q.shape[3] ** -0.5 if scale is None else scale)
    later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    mask = stripe(tokens)
    mass = torch.where(mask[:, None], logits.masked_fill(later, -torch.inf).softmax(-1), 0.0).sum(-1)
    return torch.where(mask.any(-1)[:, None], mass, 0.0).sum(-1) / mask.any(-1).sum(-1)[:, None]


def assert_right(q, k, tokens, scale=None):
    score = lockin_fast.prefix_matching(q, k, tokens, scale)
    assert score.dtype is torch.float32
    truth = plain(q.double(), k.double(), tokens, scale)
    yardstick = plain(q.float(), k.float(), tokens, scale)
    assert_as_good_as_torch("score", score, truth, yardstick)
    exact_scale = q.shape[3] ** -0.5 if scale is None else scale
    assert_as_good_as_torch("reference", reference(q, k, tokens, exact_scale), truth, yardstick)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_as_good_as_plain_torch(dtype, shape, poisoned_memory):
    assert_right(*problem(*shape, dtype))


@pytest.mark.parametrize("scale", [0.3, 0.0, -1.0])
def test_scale(scale):
    assert_right(*problem(1, 2, 1, 77, 16, torch.float32), scale)


def test_uniform_attention_counts_the_stripe():
    # Positions just after an earlier occurrence: of "a a a b a" at 1: {1}, at 2: {1, 2}, at 4: {1, 2, 3}.
    tokens = torch.tensor([[5, 5, 5, 9, 5]])
    assert stripe(tokens)[0].int().tolist() == [
        [0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 0],
    ]  # fmt: skip
    assert repeated(tokens).tolist() == [[False, True, True, False, True]]
    score = lockin_fast.prefix_matching(torch.zeros(1, 2, 5, 4), torch.randn(1, 1, 5, 4), tokens)
    expected = (1 / 2 + 2 / 3 + 3 / 5) / 3
    torch.testing.assert_close(score, torch.full((1, 2), expected), rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_tokens_repeated_twice(dtype):
    """The usual protocol: the mean of the diagonal at offset S - 1 over the second copy; an ideal head has it all."""
    make = torch.Generator().manual_seed(0)
    S = 70
    tokens = torch.randperm(1000, generator=make)[:S].repeat(1, 2)
    q, k = (torch.randn(1, 2, 2 * S, 32, generator=make).to(dtype) for _ in range(2))
    attention = (q.double() @ k.double().mT / 32**0.5).masked_fill(torch.ones(140, 140).triu(1) > 0, -torch.inf)
    diagonal = attention.softmax(-1).diagonal(1 - S, dim1=-2, dim2=-1)[..., 1:].mean(-1)
    score = lockin_fast.prefix_matching(q, k, tokens)
    torch.testing.assert_close(score.double(), diagonal, rtol=1e-5, atol=0)

    names = torch.eye(S).repeat(2, 1)[None, None].to(dtype)  # a query says its token, a key the token before it
    before = names.roll(1, 2)
    before[:, :, 0] = 0.0
    assert lockin_fast.prefix_matching(names, before, tokens, 1000.0).item() == 1.0
    assert lockin_fast.prefix_matching(names, names, tokens, 1000.0).item() == 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_keys_after_a_query_never_reach_it(bad, dtype):
    q, k, _ = problem(1, 2, 2, 90, 16, dtype)
    tokens = torch.arange(90)[None].clone()
    tokens[0, 40] = 7
    clean = lockin_fast.prefix_matching(q, k, tokens)
    for position in (41, 42, 47, 48, 89):
        spoilt = k.clone()
        spoilt[:, :, position] = bad
        assert torch.equal(lockin_fast.prefix_matching(q, spoilt, tokens), clean)
    for position in (0, 8, 33, 40):
        spoilt = k.clone()
        spoilt[:, 1, position] = torch.nan
        score = lockin_fast.prefix_matching(q, spoilt, tokens)
        assert score[0, 1].isnan() and score[0, 0] == clean[0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_at_minus_infinity_weigh_nothing(dtype):
    q, k, _ = problem(1, 2, 2, 150, 16, dtype)
    k[:, :, :100, 3] = -torch.inf
    tokens = torch.arange(150)[None].clone()
    tokens[0, 120:] = tokens[0, 90:120]
    assert_right(q.abs() + 0.1, k, tokens)


def test_a_query_counts_only_if_its_token_occurred_before():
    q, k, _ = problem(1, 2, 1, 90, 16, torch.float32)
    tokens = torch.arange(90)[None].clone()
    tokens[0, 40] = 7
    clean = lockin_fast.prefix_matching(q, k, tokens)
    others = q.clone()
    others[0, :, :40] = torch.nan
    others[0, :, 41:] = torch.nan
    assert torch.equal(lockin_fast.prefix_matching(others, k, tokens), clean)
    for bad in (torch.nan, torch.inf):
        spoilt = q.clone()
        spoilt[0, 1, 40, 3] = bad
        score = lockin_fast.prefix_matching(spoilt, k, tokens)
        assert score[0, 1].isnan() and score[0, 0] == clean[0, 0]


def test_no_repeated_token_is_nan():
    q, k, _ = problem(2, 3, 1, 20, 8, torch.float32)
    tokens = torch.stack([torch.arange(20), torch.zeros(20, dtype=torch.int64)])
    score = lockin_fast.prefix_matching(q, k, tokens)
    assert score[0].isnan().all() and score[1].isfinite().all()


@pytest.mark.parametrize("shape", [(1, 2, 1, 0, 8), (0, 2, 1, 9, 8), (2, 0, 1, 9, 8), (1, 2, 1, 1, 8)], ids=str)
def test_nothing_to_do(shape, poisoned_memory):
    batch, heads, groups, length, width = shape
    q, k = torch.randn(batch, heads, length, width), torch.randn(batch, groups, length, width)
    score = lockin_fast.prefix_matching(q, k, torch.zeros(batch, length, dtype=torch.int64))
    assert score.shape == (batch, heads) and score.isnan().all()


def test_token_ids_of_any_size():
    q, k, tokens = problem(1, 2, 1, 60, 8, torch.float32)
    score = lockin_fast.prefix_matching(q, k, tokens)
    distinct = torch.tensor([0, 2**32, -(2**32), 2**62, -1, -(2**63), 2**31, 5] + [2**33 * i for i in range(2, 20)])
    assert torch.equal(lockin_fast.prefix_matching(q, k, distinct[tokens]), score)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype):
    q, k, tokens = problem(2, 4, 2, 50, 16, dtype)
    score = lockin_fast.prefix_matching(q, k, tokens)
    token_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    slices = [torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., :16] for x in (q, k)]
    columns = [x.mT.contiguous().mT for x in (q, k)]
    for a, b in (token_major, slices, columns):
        assert torch.equal(lockin_fast.prefix_matching(a, b, tokens.t().contiguous().t()), score)
    one = k[:, :1].expand(-1, 4, -1, -1)
    assert torch.equal(lockin_fast.prefix_matching(q, one, tokens), lockin_fast.prefix_matching(q, k[:, :1], tokens))


def test_huge_and_tiny_logits():
    q, k, tokens = problem(1, 2, 1, 70, 16, torch.float32)
    assert_right(q * 1e15, k * 1e15, tokens)
    assert_right(q * 1e-40, k, tokens)
    assert lockin_fast.prefix_matching(q * 1e30, k * 1e30, tokens).isnan().all()
    assert plain(q * 1e30, k * 1e30, tokens).isnan().all()


@pytest.mark.parametrize("count", [24, 4096])
def test_two_keys_in_closed_form(count):
    """Attention e^x / (1 + e^x) down to 1e-37: the relative error is that of the exponential."""
    x = torch.linspace(-86, 0, count)
    k = torch.stack([torch.zeros(count), x], 1)[:, None, :, None]
    tokens = torch.zeros(count, 2, dtype=torch.int64)
    score = lockin_fast.prefix_matching(torch.ones(count, 1, 2, 1), k, tokens, 1.0)[:, 0].double()
    torch.testing.assert_close(score, x.double().sigmoid(), rtol=4 * EPS, atol=0)
    score = lockin_fast.prefix_matching(-torch.ones(count, 1, 2, 1), k, tokens, 1.0)[:, 0].double()
    torch.testing.assert_close(score, (-x.double()).sigmoid(), rtol=4 * EPS, atol=0)


def test_threads_change_nothing():
    # bf16, which triton's interpreter leaves to the reference: two threads at once crash it.
    arguments = problem(2, 3, 3, 150, 16, torch.bfloat16)
    score = lockin_fast.prefix_matching(*arguments)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(lockin_fast.prefix_matching, *arguments) for _ in range(8)]
        assert all(torch.equal(score, call.result()) for call in calls)
    for threads in (1, 3):
        with on_threads(threads):
            assert torch.equal(score, lockin_fast.prefix_matching(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(dtype):
    op = torch.ops.lockin_fast.prefix_matching.default
    torch.library.opcheck(op, (*problem(2, 4, 2, 30, 16, dtype), 0.25), test_utils=CHECKS)


def test_traces_as_one_graph_and_waits_for_nothing():
    torch._dynamo.reset()
    compiled = torch.compile(lockin_fast.prefix_matching, fullgraph=True, backend="aot_eager")
    arguments = problem(2, 4, 2, 30, 16, torch.float32)
    torch.testing.assert_close(compiled(*arguments), lockin_fast.prefix_matching(*arguments))
    q = arguments[0].clone().requires_grad_()
    assert not lockin_fast.prefix_matching(q, *arguments[1:]).requires_grad
    with FakeTensorMode(allow_non_fake_inputs=False):
        q, k = (torch.empty(2, n, 30, 16, dtype=torch.bfloat16) for n in (4, 2))
        tokens = torch.empty(2, 30, dtype=torch.int64)
        score = lockin_fast.prefix_matching(q, k, tokens)
        assert score.shape == (2, 4) and score.dtype is torch.float32
        assert repeated(tokens).shape == (2, 30)


def test_errors_name_the_argument():
    q, k, tokens = problem(2, 4, 2, 10, 8, torch.float32)
    for arguments, error, text in (
        ((None, k, tokens), TypeError, r"^q: got NoneType, expected a tensor \[B, heads, T, D\]"),
        ((q, [k], tokens), TypeError, r"^k: got list, expected a tensor \[B, heads, T, D\]"),
        ((q.double(), k, tokens), TypeError, "^q: got torch.float64, expected float32, float16 or bfloat16"),
        ((q, k.long(), tokens), TypeError, "^k: got torch.int64, expected float32, float16 or bfloat16"),
        ((q[0], k, tokens), ValueError, r"^q: got shape \(4, 10, 8\), expected \[B, heads, T, D\]"),
        ((q, k[0], tokens), ValueError, r"^k: got shape \(2, 10, 8\), expected \[B, heads, T, D\]"),
        ((q, k.half(), tokens), ValueError, r"^k: got torch.float16 \(2, 2, 10, 8\), expected torch.float32 \[2, Hkv"),
        ((q, k[:, :, :9], tokens), ValueError, r"^k: got torch.float32 \(2, 2, 9, 8\)"),
        ((q[:, :3], k, tokens), ValueError, "with Hkv a divisor of its 3 heads"),
        ((q, k[:, :0], tokens), ValueError, "with Hkv a divisor of its 4 heads"),
        ((q, k, tokens.tolist()), TypeError, r"^tokens: got list, expected a tensor \[2, 10\]"),
        ((q, k, tokens.int()), ValueError, r"^tokens: got torch.int32 \(2, 10\), expected int64 \[2, 10\]"),
        ((q, k, tokens[:, :9]), ValueError, r"^tokens: got torch.int64 \(2, 9\), expected int64 \[2, 10\]"),
        ((q, k.to("meta"), tokens), ValueError, "^k: is on meta, but q is on cpu; move it there"),
        ((q, k, tokens.to("meta")), ValueError, "^tokens: is on meta, but q is on cpu; move it there"),
    ):
        with pytest.raises(error, match=text):
            lockin_fast.prefix_matching(*arguments)


MEMORY = """
q, k = (torch.randn(1, 4, 2048, 64) for _ in range(2))
tokens = torch.arange(1024).repeat(1, 2)
lockin_fast.prefix_matching(q[:, :, :256], k[:, :, :256], tokens[:, :256] % 99)
_, risen = rise(lambda: lockin_fast.prefix_matching(q, k, tokens))
print(risen, next(r.backend for r in lockin_fast.backends() if r.op == "prefix_matching"))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_scratch_memory():
    megabytes, backend = printed(MEMORY, OMP_NUM_THREADS="1")
    matrix = 4 * 4 * 2048**2 / 2**20
    assert float(megabytes) < (0.01 if backend == "cpu" else 0.5) * matrix
