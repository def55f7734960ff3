"""Matching two SAEs' latents by hand, against brute force and all permutations."""

import itertools

import numpy as np
import pytest
import torch

from lockin_fast.lockin import matching
from lockin_fast.lockin.matching import assigned, mutual_nearest


def normal(*shape, seed=0):
    return torch.tensor(np.random.default_rng(seed).normal(size=shape)).float()


def test_nearest_by_hand():
    first = torch.tensor([[2.0, 0.0], [0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    second = torch.tensor([[0.0, 5.0], [1.0, 0.0], [0.0, 0.0]])
    # (3, 4) is nearest to (0, 5), which is nearer to (0, 1); rows of zeros match nothing.
    found = mutual_nearest(first, second)
    assert found.first.tolist() == [0, 3] and found.second.tolist() == [1, 0] and found.cosine.tolist() == [1, 1]
    best = assigned(first, second)
    assert best.first.tolist() == [0, 3] and best.second.tolist() == [1, 0]


@pytest.mark.parametrize("tile", [2**22, 40])
@pytest.mark.parametrize("sizes", [(1, 1), (30, 17), (17, 30)])
def test_nearest_against_all_cosines(sizes, tile, monkeypatch):
    monkeypatch.setattr(matching, "TILE_ELEMENTS", tile)
    first, second = normal(sizes[0], 8), normal(sizes[1], 8, seed=1)
    cosines = torch.cosine_similarity(first[:, None], second[None], dim=-1)
    forth, back = cosines.argmax(1), cosines.argmax(0)
    expected = [(i, int(j)) for i, j in enumerate(forth) if back[j] == i]
    found = mutual_nearest(first, second)
    assert list(zip(found.first.tolist(), found.second.tolist(), strict=True)) == expected
    assert torch.allclose(found.cosine, cosines[found.first, found.second], atol=1e-6)
    assert (found.cosine.abs() <= 1).all()
    turned = mutual_nearest(second, first)
    assert sorted(zip(turned.second.tolist(), turned.first.tolist(), strict=True)) == expected


@pytest.mark.parametrize("match", [mutual_nearest, assigned])
def test_a_shuffled_and_scaled_sae_is_found_again(match):
    decoder, order = normal(64, 16), torch.tensor(np.random.default_rng(3).permutation(64))
    found = match(decoder, (decoder * torch.arange(1.0, 65)[:, None])[order])
    assert found.first.tolist() == list(range(64)) and torch.equal(order[found.second], found.first)
    assert found.cosine.min() > 1 - 1e-6 and found.cosine.max() <= 1


def test_of_equal_latents_the_first_is_matched():
    twin = torch.ones(3, 4)
    found = mutual_nearest(twin, twin)
    assert (found.first.tolist(), found.second.tolist()) == ([0], [0])


@pytest.mark.parametrize("sizes", [(5, 5), (4, 6), (6, 4)])
def test_assignment_against_all_permutations(sizes):
    first, second = normal(sizes[0], 3), normal(sizes[1], 3, seed=1)
    found = assigned(first, second)
    cosines = torch.cosine_similarity(first[:, None], second[None], dim=-1).double().cpu().numpy()
    wide = cosines if sizes[0] <= sizes[1] else cosines.T
    best = max(
        sum(wide[i, j] for i, j in enumerate(chosen))
        for chosen in itertools.permutations(range(wide.shape[1]), wide.shape[0])
    )
    assert len(found.first) == min(sizes) == len(set(found.first.tolist())) == len(set(found.second.tolist()))
    assert found.cosine.sum().item() == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("match", [mutual_nearest, assigned])
def test_refusals_name_the_argument(match):
    decoder = normal(4, 3)
    with pytest.raises(ValueError, match=r"second: got torch.float32 \[4, 2\], expected .* \[F, 3\]"):
        match(decoder, decoder[:, :2])
    with pytest.raises(ValueError, match=r"first: got torch.float32 \[3\]"):
        match(decoder[0], decoder)
    with pytest.raises(ValueError, match="second: got torch.int64"):
        match(decoder, decoder.long())
    with pytest.raises(ValueError, match="second: NaN or Inf"):
        match(decoder, decoder / 0)
    assert match(decoder, torch.zeros(2, 3)).first.tolist() == []


def test_a_large_assignment_is_refused(monkeypatch):
    monkeypatch.setattr(matching, "LARGEST", 3)
    with pytest.raises(ValueError, match="got 4 latents, expected at most 3; use mutual_nearest"):
        assigned(normal(2, 3), normal(4, 3))
