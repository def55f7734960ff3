"""Persona directions by hand, against loops and scipy, and the nulls' p values where there is nothing to find."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from lockin_fast.lockin.persona import alignment, consistency, persona_direction


def normal(*shape, seed=0):
    return torch.tensor(np.random.default_rng(seed).normal(size=shape))


def test_direction_by_hand():
    positive = torch.tensor([[[4.0, 0.0], [1.0, 1.0]], [[2.0, 8.0], [1.0, 1.0]]])  # 2 pairs, 2 layers, width 2
    negative = torch.tensor([[[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 2.5]]])
    found = persona_direction(positive, negative)
    assert found.dtype == torch.float64 and found.tolist() == [[0.6, 0.8], [0.0, -1.0]]
    assert torch.equal(persona_direction(positive[:, 0], negative[:, 0]), found[0])
    assert torch.equal(persona_direction(negative, positive), -found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_direction_is_of_unit_length_and_knows_no_scale(dtype):
    positive, negative = normal(7, 3, 48).to(dtype), normal(7, 3, 48, seed=1).to(dtype)
    found = persona_direction(positive, negative)
    assert torch.allclose(found.norm(dim=-1), torch.ones(3, dtype=torch.float64), atol=1e-14)
    assert torch.allclose(persona_direction(4 * positive, 4 * negative), found, atol=1e-14)
    shift = normal(3, 48, seed=2).double()
    moved = persona_direction(positive.double() + shift, negative.double() + shift)
    assert torch.allclose(moved, found, atol=1e-12)


def test_alignment_by_hand():
    found = alignment(torch.tensor([0.0, 2.0]), torch.tensor([[3.0, 5.0], [3.0, 3.0]]))
    assert found.cosine.item() == pytest.approx(0.8) and found.projection == 4 and found.norm == 5
    # Of +-5 +-3 two patterns of four are as far from zero; in the plane cos >= 0.8 is 2 acos(0.8) / pi of the circle.
    assert found.p_sign_flip == 0.5 and found.exact
    assert found.p_random.item() == pytest.approx(2 * math.acos(0.8) / math.pi)
    assert found.null_95 == pytest.approx(math.cos(0.05 * math.pi / 2))


@pytest.mark.parametrize("width", [2, 3, 48])
def test_random_directions_are_as_the_exact_null_says(width):
    vectors = normal(5, width)
    exact = alignment(normal(width, seed=1), vectors)
    drawn = normal(20_000, width, seed=2)
    mean = vectors.mean(0)
    cosines = (drawn @ mean).abs() / drawn.norm(dim=1) / mean.norm()
    sampled = (1 + int((cosines >= exact.cosine.abs()).sum())) / (1 + len(drawn))
    p = exact.p_random.item()
    assert abs(sampled - p) <= 4 * math.sqrt(p * (1 - p) / len(drawn)) + 1 / len(drawn)
    assert abs((cosines > exact.null_95).double().mean().item() - 0.05) <= 4 * math.sqrt(0.05 * 0.95 / len(drawn))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_alignment_against_a_loop_over_layers_and_sign_patterns(count):
    direction, vectors = normal(3, 9), normal(count, 3, 9, seed=1)
    found = alignment(direction, vectors)
    for layer in range(3):
        unit = (direction[layer] / direction[layer].norm()).cpu().numpy()
        own = vectors[:, layer].cpu().numpy()
        mean = own.mean(0)
        assert found.projection[layer].item() == pytest.approx(mean @ unit, abs=1e-13)
        assert found.cosine[layer].item() == pytest.approx(mean @ unit / np.linalg.norm(mean), abs=1e-13)
        patterns = [abs(np.dot(signs, own @ unit)) for signs in itertools.product((1, -1), repeat=count)]
        assert found.p_sign_flip[layer] == np.mean(np.array(patterns) >= patterns[0] - 1e-12)
    assert found.exact and (found.cosine.abs() <= 1).all()


def test_alignment_knows_no_length_of_the_direction_and_turns_with_its_sign():
    direction, vectors = normal(2, 16), normal(30, 2, 16, seed=1)
    found, longer, turned = (alignment(scale * direction, vectors) for scale in (1, 1000, -1))
    for name in ("cosine", "projection", "p_random", "p_sign_flip"):
        sign = -1 if name in ("cosine", "projection") else 1
        assert torch.allclose(getattr(longer, name), getattr(found, name), atol=1e-13)
        assert torch.allclose(getattr(turned, name), sign * getattr(found, name), atol=1e-13)
    assert not found.exact


def test_parallel_vectors_have_cosine_one_and_the_least_p():
    direction = normal(40)
    found = alignment(direction, direction.expand(64, 40), draws=199)
    assert 1 - 1e-15 <= found.cosine <= 1 and found.p_sign_flip == 1 / 200 and found.p_random < 1e-100
    assert found.projection.item() == pytest.approx(direction.norm().item())


def test_no_shift_has_no_cosine():
    found = alignment(normal(2, 4), torch.zeros(3, 2, 4))
    assert found.cosine.isnan().all() and found.p_random.isnan().all()
    assert found.projection.tolist() == [0, 0] and found.p_sign_flip.tolist() == [1, 1]


def uniform(p, least):
    """Whether p values that are multiples of `least` look uniform; a true one fails in 1 of 1000 cases."""
    p = p.cpu().numpy()
    for alpha in (0.05, 0.25, 0.5):
        expected = math.floor(alpha / least + 1e-9) * least  # what a discrete p value can reach
        spread = math.sqrt(expected * (1 - expected) / len(p))
        assert abs(np.mean(p <= alpha + 1e-9) - expected) <= 3.9 * spread, alpha
    jitter = np.random.default_rng(5).uniform(0, least, len(p))
    assert stats.kstest(p - jitter, "uniform").pvalue > 1e-3


def test_p_values_are_uniform_where_there_is_nothing():
    found = alignment(normal(1000, 6), normal(8, 1000, 6, seed=1), draws=255)
    assert found.exact
    uniform(found.p_sign_flip, 2 / 256)  # a pattern and its opposite tie
    assert stats.kstest(found.p_random.cpu().numpy(), "uniform").pvalue > 1e-3
    pairs = consistency(normal(8, 1000, 6, seed=2), normal(8, 1000, 6, seed=3), draws=255)
    uniform(pairs.p_sign_flip, 2 / 256)
    assert abs(pairs.cosine.mean().item()) <= 4 * pairs.cosine.std().item() / math.sqrt(1000)


def test_sampled_p_values_are_corrected_and_reproducible():
    direction, vectors = normal(300, 4), normal(20, 300, 4, seed=1)
    found = alignment(direction, vectors, draws=99, seed=3)
    assert not found.exact and found.p_sign_flip.min() >= 0.01 and found.p_sign_flip.max() <= 1
    assert torch.equal((found.p_sign_flip * 100).round() / 100, found.p_sign_flip)
    assert torch.equal(alignment(direction, vectors, draws=99, seed=3).p_sign_flip, found.p_sign_flip)
    assert not torch.equal(alignment(direction, vectors, draws=99, seed=4).p_sign_flip, found.p_sign_flip)


def test_consistency_by_hand():
    """(1, 0) and (3, 4): the cosine of the two is 0.6, the projections of one on the other 0.6 and 3."""
    found = consistency(torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.zeros(2, 2))
    assert found.cosine.item() == pytest.approx(0.6) and found.projection.item() == pytest.approx(1.8)
    assert found.p_sign_flip == 0.5 and found.exact


@pytest.mark.parametrize("pairs", [2, 5])
def test_consistency_against_a_loop(pairs):
    positive, negative = normal(pairs, 2, 9), normal(pairs, 2, 9, seed=1)
    found = consistency(positive, negative)
    for layer in range(2):
        differences = (positive - negative)[:, layer].cpu().numpy()

        def statistic(signs, differences=differences):
            own = np.array(signs)[:, None] * differences
            others = [np.delete(own, i, 0).sum(0) for i in range(pairs)]
            along = [a @ b / np.linalg.norm(b) for a, b in zip(own, others, strict=True)]
            return np.mean(along / np.linalg.norm(own, axis=1)), np.mean(along)

        patterns = [statistic(signs)[0] for signs in itertools.product((1, -1), repeat=pairs)]
        assert (found.cosine[layer].item(), found.projection[layer].item()) == pytest.approx(
            statistic([1] * pairs), abs=1e-12
        )
        assert found.p_sign_flip[layer] == np.mean(np.array(patterns) >= patterns[0] - 1e-12)


def test_consistent_pairs_are_found_among_noise():
    noise = normal(24, 1, 64)
    found = consistency(noise + 1.0, torch.zeros_like(noise))
    assert found.cosine > 0.4 and found.p_sign_flip == 1 / 10_000


def test_others_that_cancel_have_no_direction():
    pairs = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    # Against the third pair the other two sum to nothing; the first has (-1, 1) / sqrt 2, the second (1, 1) / sqrt 2.
    assert consistency(pairs, torch.zeros(3, 2)).cosine.item() == pytest.approx(-2 / math.sqrt(2) / 3)


def test_refusals_name_the_argument():
    states = torch.ones(3, 2, 4)
    with pytest.raises(ValueError, match=r"negative: got \[3, 2\], expected \[3, 2, 4\]"):
        persona_direction(states, torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"equal means in layer \[0\]"):
        persona_direction(states, states)
    with pytest.raises(ValueError, match="equal means, which"):
        persona_direction(states[:, 0], states[:, 0])
    with pytest.raises(ValueError, match=r"positive: got torch.float32 \[0, 4\]"):
        persona_direction(torch.ones(0, 4), torch.ones(0, 4))
    with pytest.raises(ValueError, match="positive: got torch.int64"):
        persona_direction(torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 4))
    broken = states.clone()
    broken[1, 1, 2] = math.nan
    with pytest.raises(ValueError, match="negative: NaN or Inf in row 1"):
        persona_direction(states, broken)
    with pytest.raises(ValueError, match="vectors: NaN or Inf in row 1"):
        alignment(states[0], broken)
    with pytest.raises(ValueError, match=r"direction: got \[4\], expected \[2, 4\]"):
        alignment(torch.ones(4), states)
    with pytest.raises(ValueError, match=r"direction: zero in layer \[1\]"):
        alignment(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0] * 4]), states)
    with pytest.raises(ValueError, match="direction: got width 1"):
        alignment(torch.ones(1), torch.ones(3, 1))
    for call in (alignment, consistency):
        with pytest.raises(ValueError, match="draws: got 0"):
            call(states, states, draws=0)
    with pytest.raises(ValueError, match="got 1 pair, expected at least 2"):
        consistency(states[:1], 2 * states[:1])
    with pytest.raises(ValueError, match=r"equal in pair 1 in layer \[0\]"):
        consistency(torch.tensor([[[1.0, 0]], [[2.0, 0]]]), torch.tensor([[[0.0, 0]], [[2.0, 0]]]))
