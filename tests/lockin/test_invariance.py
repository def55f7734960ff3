"""Prompt invariance: examples by hand, scipy, invariances, and the logits of a tiny model read row by row."""

import math

import numpy as np
import pytest
import tiny_llama
import torch
from scipy.spatial.distance import jensenshannon

from lockin_fast.lockin.invariance import (
    ClusterTokens,
    Divergence,
    cluster_divergence,
    cluster_tokens,
    forced_logits,
    prompt_invariance,
)
from lockin_fast.lockin.suite_files import Cluster
from lockin_fast.patching.forward import Runner


def logits_of(*distributions):
    """[n, 1, V] of these next-token distributions."""
    return torch.tensor(distributions).log()[:, None]


APART = logits_of([1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0])
HALF = logits_of([0.5, 0.5], [1.0, 0.0])
HALF_BITS = -0.75 * math.log2(0.75) - 0.25 * math.log2(0.25) - 0.5  # H(3/4, 1/4) - (1 + 0) / 2 = 0.3113


def random_logits(seed, n=3, positions=4, vocabulary=11):
    return 3 * torch.randn(n, positions, vocabulary, generator=torch.Generator().manual_seed(seed))


def test_divergence_by_hand():
    assert cluster_divergence(APART) == (1, 1)
    assert cluster_divergence(torch.eye(4).log()[:, None]) == (2, 2)
    # The second position says the same everywhere: the sequence's mean is half of the first position's.
    both = torch.cat([HALF, logits_of([0.3, 0.7], [0.3, 0.7])], 1)
    assert cluster_divergence(both) == pytest.approx((HALF_BITS, HALF_BITS / 2), abs=1e-7)


def test_invariance_by_hand():
    found = prompt_invariance([APART, torch.zeros(3, 2, 5), HALF])
    expected = (1 + 0 + HALF_BITS) / 3
    assert (found.next_token, found.sequence) == pytest.approx((expected, expected), abs=1e-7)
    assert found.clusters[0] == Divergence(1, 1) and found.masked == 0
    assert 0 <= found.sequence_interval[0] <= found.sequence <= found.sequence_interval[1] <= 1


@pytest.mark.parametrize("seed", range(5))
def test_divergence_of_two_is_the_square_of_scipys_distance(seed):
    logits = random_logits(seed, n=2)
    p, q = logits.double().softmax(-1).numpy()
    bits = jensenshannon(p, q, base=2, axis=-1) ** 2
    # The logits are exact in fp64 and the result is rounded to fp32 once, and a mean of such is no further off.
    assert cluster_divergence(logits) == pytest.approx((bits[0], bits.mean()), rel=2e-6)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_identical_prompts_do_not_differ_and_order_does_not_matter(n):
    logits = random_logits(n, n=n)
    assert cluster_divergence(logits[:1].expand(n, -1, -1)) == pytest.approx((0, 0), abs=1e-12)
    found = cluster_divergence(logits)
    assert 0 < found.next_token <= math.log2(n) and 0 < found.sequence <= math.log2(n)
    turned = logits[torch.randperm(n, generator=torch.Generator().manual_seed(1))]
    assert cluster_divergence(turned) == pytest.approx(found, rel=2e-6)
    shifted = logits + torch.randn(n, 4, 1, generator=torch.Generator().manual_seed(2))  # softmax does not see it
    assert cluster_divergence(shifted) == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("position", [0, 3])
def test_clusters_with_nan_are_masked_and_counted(bad, position):
    broken = random_logits(0)
    broken[1, position, 5] = bad
    found = prompt_invariance([random_logits(1), broken, random_logits(2)])
    plain = prompt_invariance([random_logits(1), random_logits(2)])
    assert found.masked == 1 and found.clusters[1] is None
    assert (found.next_token, found.sequence) == (plain.next_token, plain.sequence)
    with pytest.raises(ValueError, match="none of 1 was measured.*NaN"):
        prompt_invariance([broken])


@pytest.mark.parametrize(
    "logits, message",
    [
        (torch.zeros(0, 2, 5), "got 0 paraphrases"),
        (torch.zeros(1, 2, 5), "got 1 paraphrases, expected at least two"),
        (torch.zeros(3, 0, 5), "no position"),
        (torch.zeros(3, 2, 1), "vocabulary of 1"),
        (torch.zeros(3, 5), r"shape \(3, 5\)"),
        (torch.zeros(3, 2, 5, dtype=torch.int64), "int64"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_its_number(logits, message):
    with pytest.raises(ValueError, match=f"number 1: .*{message}"):
        prompt_invariance([APART, logits])


def test_no_cluster_is_refused():
    with pytest.raises(ValueError, match="got none, expected the logits"):
        prompt_invariance(iter(()))


CLUSTERS = [
    ClusterTokens([[5, 9, 11], [7, 7, 31, 8, 12], [9]], [13, 14, 15, 6]),
    ClusterTokens([[4, 6], [20, 6, 21]], [17]),
    ClusterTokens([[8, 30, 22], [22, 30, 8]], [18, 19]),
]


@pytest.mark.parametrize("batch_size", [1, 5, 7, 100])
def test_forced_logits_are_those_of_every_row_alone(batch_size):
    model = tiny_llama.model(initializer_range=0.3).eval()
    batches = []
    model.register_forward_hook(lambda module, args, kwargs, output: batches.append(kwargs), with_kwargs=True)
    runner = Runner(model)
    batches.clear()
    found = list(forced_logits(runner, CLUSTERS, batch_size=batch_size))
    assert len(batches) == {1: 3, 5: 2, 7: 1, 100: 1}[batch_size]
    exact = tiny_llama.model(initializer_range=0.3).eval().double()
    for logits, cluster in zip(found, CLUSTERS, strict=True):
        for row, prompt in zip(logits, cluster.prompts, strict=True):
            ids = torch.tensor([[*prompt, *cluster.reply]])
            with torch.no_grad():
                expected = exact(ids).logits[0, len(prompt) - 1 : -1]
                alone = model(ids).logits[0, len(prompt) - 1 : -1]
            error = (alone - expected).abs().max()  # of the same computation without the batch
            assert (row - expected).abs().max() <= 2 * error + 8 * torch.finfo().eps * expected.abs().max()
    measured = prompt_invariance(found)
    assert measured.next_token > 0 and not found[0].requires_grad


@pytest.mark.parametrize("cluster", [([], [3]), ([[4], []], [3]), ([[4], [5]], [])])
def test_empty_clusters_are_refused_before_any_work(cluster):
    with pytest.raises(ValueError, match="number 1 is empty"):
        forced_logits(None, [CLUSTERS[0], ClusterTokens(*cluster)], batch_size=4)


def test_clusters_become_chats():
    tokenizer = tiny_llama.tokenizer()
    tokens = cluster_tokens(tokenizer, Cluster("c", ("w1 w2", "w2"), "w3 w4"))
    assert [tokenizer.decode(ids) for ids in tokens.prompts] == ["<user> w1 w2 <assistant>", "<user> w2 <assistant>"]
    assert tokenizer.decode(tokens.reply) == "w3 w4"
    with pytest.raises(ValueError, match="cluster c.*the same tokens"):
        cluster_tokens(tokenizer, Cluster("c", ("What?", "Who?"), "w3"))
    with pytest.raises(ValueError, match="cluster c.*no token"):
        cluster_tokens(tokenizer, Cluster("c", ("w1", "w2"), " "))


def test_the_interval_holds_the_mean_of_many_clusters():
    found = prompt_invariance([random_logits(seed, positions=1) for seed in range(40)], level=0.9)
    each = np.array(found.clusters)[:, 0]
    half = 1.645 * each.std() / math.sqrt(40)
    low, high = found.next_token_interval
    # The standard error of a percentile of 2,000 resamples is 3% of the half width; the rest is left to skewness.
    assert (low, high) == pytest.approx((each.mean() - half, each.mean() + half), abs=0.2 * half)
