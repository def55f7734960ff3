import math
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from threads import on_threads

from lockin_fast import RoutingStats, routing_stats

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (7, 2), (33, 8), (100, 13), (40, 123), (1030, 5)]


def inputs(tokens, experts, dtype, classes=3, seed=0):
    make = torch.Generator().manual_seed(seed)
    logits = (torch.randn(tokens, experts, generator=make) * 2).to(dtype)
    return logits, torch.randint(-1, classes, (tokens,), generator=make), torch.rand(tokens, generator=make) < 0.6


def by_formula(logits, classes, mask, num_classes, top_k, router, work):
    """Everything written out, token by token for the counts."""
    x = logits.to(work)
    p = x.softmax(1) if router == "softmax" else x.sigmoid() / x.sigmoid().sum(1, keepdim=True)
    entropy = torch.special.entr(p).sum(1)
    counts = torch.zeros(num_classes, logits.shape[1], dtype=torch.int64)
    load = torch.zeros(logits.shape[1], dtype=torch.int64)
    for t in mask.nonzero().flatten().tolist():
        order = sorted(range(logits.shape[1]), key=lambda e: (-x[t, e].item(), e))[:top_k]
        load[order] += 1
        if 0 <= classes[t] < num_classes:
            counts[classes[t], order] += 1
    return p[mask].sum(0), entropy[mask].sum(), load, counts


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_good_as_plain_torch(dtype, shape, router, poisoned_memory):
    logits, classes, mask = inputs(*shape, dtype)
    top_k = min(3, shape[1])
    got = routing_stats(logits, classes, num_classes=3, mask=mask, top_k=top_k, router=router)
    true, plain = (by_formula(logits, classes, mask, 3, top_k, router, w) for w in (torch.float64, torch.float32))
    # The yardstick's own sums are fp32; a probability is right to a few ulps of fp32.
    eps = torch.finfo(torch.float32).eps
    assert ((got.probability - true[0]).abs() <= 2 * (plain[0] - true[0]).abs().max() + 8 * eps * true[0]).all()
    slack = 8 * eps * max(true[1].item(), mask.sum().item() * math.log(max(shape[1], 2)))
    assert abs(got.entropy_sum - true[1]) <= 2 * abs(plain[1] - true[1]) + slack
    assert torch.equal(got.counts, true[2]) and torch.equal(got.class_counts, true[3])
    assert got.tokens == mask.sum()


def test_by_hand():
    logits = torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log()
    got = routing_stats(logits, torch.tensor([0, 1]))
    h = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(got.entropy.item(), h / math.log(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(got.mutual_information.item(), math.log(2) - h, rtol=1e-6, atol=0)
    assert got.load.tolist() == [0.5, 0.5] and got.class_counts.tolist() == [[1, 0], [0, 1]]
    corrected = math.log(2) + (1 + 1 - 1) / (2 * 2)
    torch.testing.assert_close(got.class_mutual_information.item(), corrected, rtol=1e-12, atol=0)
    sigmoid = routing_stats(torch.tensor([[0.0, math.log(3.0)]]), router="sigmoid")  # 1/2 and 3/4
    torch.testing.assert_close(sigmoid.probability, torch.tensor([0.4, 0.6], dtype=torch.float64))


def test_the_bounds_of_the_measures():
    uniform = routing_stats(torch.zeros(50, 8))
    assert abs(uniform.entropy - 1.0) < 1e-6 and abs(uniform.mutual_information) < 1e-6
    sure = routing_stats(torch.eye(8).repeat(5, 1) * 200.0)
    assert abs(sure.entropy) < 1e-6 and abs(sure.mutual_information - math.log(8)) < 1e-6
    torch.testing.assert_close(sure.load, torch.full((8,), 1 / 8, dtype=torch.float64))
    one = routing_stats(torch.randn(5, 1))
    assert one.entropy == 0.0 and one.load == 1.0 and one.mutual_information == 0.0


def test_invariances():
    logits, classes, _ = inputs(200, 8, torch.float32)
    got = routing_stats(logits, classes, num_classes=3, top_k=2)
    order = torch.randperm(8)
    permuted = routing_stats(logits[:, order], classes, num_classes=3, top_k=2)
    shifted = routing_stats(logits + 7.0, classes, num_classes=3, top_k=2)
    for measure in ("entropy", "mutual_information", "class_mutual_information"):
        for other in (permuted, shifted):
            torch.testing.assert_close(getattr(other, measure), getattr(got, measure), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(permuted.load, got.load[order])


def test_the_correction_takes_the_bias_of_independent_classes_away():
    make = torch.Generator().manual_seed(0)
    corrected, plain = 0.0, 0.0
    for _ in range(30):
        logits, classes = torch.randn(300, 6, generator=make), torch.randint(0, 4, (300,), generator=make)
        stats = routing_stats(logits, classes, num_classes=4)
        f = stats.class_counts.double() / 300
        entropies = [torch.special.entr(x).sum() for x in (f.sum(0), f.sum(1), f)]
        plain += (entropies[0] + entropies[1] - entropies[2]).item() / 30
        corrected += stats.class_mutual_information.item() / 30
    assert plain > 0.015 and abs(corrected) < 0.006


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_batches_merge(router):
    logits, classes, mask = inputs(90, 13, torch.float32)
    parts = [
        routing_stats(logits[a:b], classes[a:b], num_classes=3, mask=mask[a:b], top_k=2, router=router)
        for a, b in ((0, 17), (17, 17), (17, 90))
    ]
    whole = routing_stats(logits, classes, num_classes=3, mask=mask, top_k=2, router=router)
    merged = sum(parts)
    assert isinstance(merged, RoutingStats) and merged.tokens == whole.tokens
    assert torch.equal(merged.counts, whole.counts) and torch.equal(merged.class_counts, whole.class_counts)
    torch.testing.assert_close(merged.probability, whole.probability, rtol=1e-6, atol=0)
    torch.testing.assert_close(merged.entropy, whole.entropy, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="cannot merge 13 experts by 3 classes with 13 experts by 0 classes"):
        whole + routing_stats(logits)


def test_more_tokens_than_a_program_takes_at_a_time():
    logits, _, mask = inputs(300, 2049, torch.float32)
    got = routing_stats(logits, mask=mask)
    expected = logits.double().softmax(1)[mask].sum(0)
    torch.testing.assert_close(got.probability, expected, rtol=1e-5, atol=0)
    assert torch.equal(got.counts, logits.argmax(1)[mask].bincount(minlength=2049))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_lower_expert_wins_a_tie_of_zeros_and_of_what_ranks_as_infinity(dtype):
    nan, inf = torch.nan, torch.inf
    tied = torch.tensor([[-0.0, 0.0, -1.0], [0.0, -0.0, -1.0], [inf, nan, 1.0], [nan, inf, 1.0], [-nan, 1.0, -inf]])
    tied[4, 0] = -tied[4, 0].abs()  # a NaN with its sign set
    assert routing_stats(tied.to(dtype)).counts.tolist() == [5, 0, 0]


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_extreme_logits(dtype, router):
    logits = torch.zeros(6, 4)
    logits[0, 1:] = -torch.inf
    logits[1] = torch.tensor([3e4, -3e4, 3e4, -3e4])
    logits[2] = torch.tensor([-3e4, -3.1e4, -3.2e4, -3.3e4])
    logits[3] = torch.tensor([1e-7, 0.0, -0.0, -1e-7])
    logits[4, 2], logits[5, 3] = torch.nan, torch.inf
    logits = logits.to(dtype)
    got = routing_stats(logits[:4], top_k=2, router=router)
    even = torch.tensor([1.0, 0, 0, 0]) + torch.tensor([0.5, 0, 0.5, 0]) + torch.tensor([1.0, 0, 0, 0]) + 0.25
    torch.testing.assert_close(got.probability, even.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.entropy_sum.item(), math.log(2) + math.log(4), rtol=1e-5, atol=0)
    # 0 and 1; 0 and 2; 0 and 1; 0 and then the lower of equals (in fp16, 1e-7 is above 0 too)
    assert got.counts.tolist() == [4, 3, 1, 0]
    assert routing_stats(logits[4:5], router=router).entropy.isnan()
    assert routing_stats(logits[4:5], router=router).counts.tolist() == [0, 0, 1, 0]
    assert routing_stats(logits[5:], router=router).counts.tolist() == [0, 0, 0, 1]
    masked = routing_stats(logits, mask=torch.arange(6) < 4, top_k=2, router=router)
    assert torch.equal(masked.probability, got.probability) and torch.equal(masked.counts, got.counts)


def test_shapes_strides_and_no_tokens(poisoned_memory):
    logits, classes, mask = inputs(24, 5, torch.float32)
    whole = routing_stats(logits, classes, num_classes=3, mask=mask)
    wide = torch.full((24, 9), 50.0)
    wide[:, 2:7] = logits
    others = (
        (wide[:, 2:7], classes, mask),
        (logits.t().contiguous().t(), classes, mask),
    )
    for a, b, c in (*others, (logits.view(2, 12, 5), classes.view(2, 12), mask.view(2, 12))):
        got = routing_stats(a, b, num_classes=3, mask=c)
        assert torch.equal(got.probability, whole.probability) and torch.equal(got.class_counts, whole.class_counts)
    for none in (routing_stats(logits[:0], classes[:0], num_classes=3), routing_stats(logits, mask=mask & False)):
        assert none.tokens == 0 and not none.probability.any() and not none.counts.any() and none.entropy.isnan()
    assert routing_stats(logits, classes.clamp_min(0)).class_counts.shape == (3, 5)
    assert torch.equal(routing_stats(logits).class_counts, torch.zeros(0, 5, dtype=torch.int64))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="triton's interpreter is not for two threads")
def test_two_threads_at_once_and_any_number_of_threads():
    cases = [inputs(5000, 16, torch.bfloat16, seed=seed)[:2] for seed in range(4)]
    expected = [routing_stats(*case, num_classes=3, top_k=2) for case in cases]

    def same(got, right):
        return all(torch.equal(value, getattr(right, name)) for name, value in vars(got).items())

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda case: routing_stats(*case, num_classes=3, top_k=2), cases))
    assert all(map(same, results, expected))
    for threads in (1, 3):
        with on_threads(threads):
            assert same(routing_stats(*cases[0], num_classes=3, top_k=2), expected[0])


LOGITS, CLASSES = torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((None,), {}, TypeError, "router_logits: got NoneType"),
        ((LOGITS.double(),), {}, TypeError, "router_logits: got torch.float64"),
        ((LOGITS[:, :0],), {}, ValueError, r"router_logits: got shape \(4, 0\)"),
        ((LOGITS, CLASSES.int()), {}, TypeError, "classes: got torch.int32"),
        ((LOGITS, CLASSES[:3]), {}, ValueError, r"classes: got shape \(3,\)"),
        ((LOGITS, CLASSES + 2), {"num_classes": 2}, ValueError, "classes: got 2, expected -1 to 1"),
        ((LOGITS, CLASSES - 2), {"num_classes": 2}, ValueError, "classes: got -2"),
        ((LOGITS, CLASSES), {"num_classes": -1}, ValueError, "num_classes: got -1"),
        ((LOGITS,), {"num_classes": 2}, ValueError, "num_classes: got 2 without classes"),
        ((LOGITS,), {"mask": CLASSES}, TypeError, "mask: got torch.int64"),
        ((LOGITS,), {"mask": CLASSES[:2] > 0}, ValueError, "mask: got shape .*leading dimensions of router_logits"),
        ((LOGITS,), {"top_k": 0}, ValueError, "top_k: got 0, expected 1 to 8"),
        ((LOGITS,), {"top_k": 9}, ValueError, "top_k: got 9"),
        ((LOGITS,), {"router": "hash"}, ValueError, "router: got 'hash', expected one of softmax, sigmoid"),
        ((LOGITS, CLASSES.to("meta")), {"num_classes": 2}, ValueError, "classes: is on meta, but router_logits is on"),
    ],
)
def test_wrong_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        routing_stats(*arguments, **options)
