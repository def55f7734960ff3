"""Latent turnover by hand, against sets made from the SAE's own encode, and the invariances of Jaccard's index."""

import dataclasses
import math

import numpy as np
import pytest
import tiny_llama
import torch

from lockin_fast.lockin import turnover
from lockin_fast.lockin.turnover import latent_turnover
from lockin_fast.sae import SparseAutoencoder

WIDTH, LATENTS = tiny_llama.WIDTH, tiny_llama.LATENTS


def normal(*shape, seed=0):
    return torch.tensor(np.random.default_rng(seed).normal(size=shape)).float()


def sae(activation="relu", normalization="none"):
    plain = tiny_llama.sae()
    threshold = 0.3 * torch.arange(LATENTS) / LATENTS if activation in ("jumprelu", "gated", "batchtopk") else None
    k = {"topk": 7, "groupmax": 8, "batchtopk": 7}.get(activation)
    return dataclasses.replace(plain, activation=activation, threshold=threshold, k=k, normalization=normalization)


def identity(latents):
    """An SAE whose latents are on where the coordinates are positive."""
    eye = torch.eye(latents)
    return SparseAutoencoder(eye, torch.zeros(latents), eye, torch.zeros(latents))


def on(*sets, latents=5):
    """Hidden states on which `identity` has these latents on."""
    return torch.tensor([[1.0 if i in chosen else -1.0 for i in range(latents)] for chosen in sets])


def test_three_tokens_by_hand():
    found = latent_turnover(identity(5), on({0, 1}, {2}, set()), on({1, 2}, {2}, set()))
    assert found.before.tolist() == [1, 1, 1, 0, 0] and found.after.tolist() == [0, 1, 2, 0, 0]
    # Of {0, 1} and {1, 2} one in three stays; {2} stays; the last token has no latent and is left out.
    assert found.by_token == pytest.approx((2 / 3 + 0) / 2) and (found.tokens, found.silent) == (3, 1)
    assert found.births(0.3).tolist() == [] and found.deaths(0.3).tolist() == [0]
    assert found.pooled(0.3) == pytest.approx(1 / 3)
    # On two of three tokens only latent 2 is on, and only after.
    assert found.births(0.5).tolist() == [2] and found.deaths(0.5).tolist() == [] and found.pooled(0.5) == 1


def test_births_and_deaths_at_the_rate_itself():
    found = latent_turnover(identity(2), on({0}, set(), latents=2), on({1}, {1}, latents=2))
    assert found.deaths(0.5).tolist() == [0] and found.deaths(0.51).tolist() == []
    assert found.births(1).tolist() == [1]


CASES = [
    ("relu", "none"), ("jumprelu", "none"), ("gated", "constant_norm_rescale"), ("batchtopk", "layer_norm"),
    ("topk", "none"), ("topk", "layer_norm"), ("groupmax", "none"),
]  # fmt: skip


@pytest.mark.parametrize("tiles", [(2**22, 1024), (60, 3)])
@pytest.mark.parametrize("activation, normalization", CASES)
def test_every_activation_against_sets(activation, normalization, tiles, monkeypatch):
    monkeypatch.setattr(turnover, "TILE_ELEMENTS", tiles[0])
    monkeypatch.setattr(turnover, "TILE_TOKENS", tiles[1])
    one = sae(activation, normalization)
    before = normal(3, 7, WIDTH)
    after = before + 0.5 * normal(3, 7, WIDTH, seed=1)
    mask = torch.tensor(np.random.default_rng(2).random((3, 7)) < 0.7)
    found = latent_turnover(one, before, after, mask=mask)
    a, b = (one.encode(stream[mask]) > 0 for stream in (before, after))
    sets = [tuple(set(row.nonzero().flatten().tolist()) for row in pair) for pair in zip(a, b, strict=True)]
    assert found.before.tolist() == a.sum(0).tolist() and found.after.tolist() == b.sum(0).tolist()
    assert found.by_token == pytest.approx(np.mean([1 - len(x & y) / len(x | y) for x, y in sets]), abs=1e-12)
    assert found.tokens == mask.sum() and found.silent == 0
    for rate in (0.01, 0.1, 0.2):
        x, y = (set((on.double().mean(0) >= rate).nonzero().flatten().tolist()) for on in (a, b))
        assert found.pooled(rate) == pytest.approx(1 - len(x & y) / len(x | y), abs=1e-12)
        assert set(found.births(rate).tolist()) == y - x and set(found.deaths(rate).tolist()) == x - y


@pytest.mark.parametrize("activation", ["relu", "topk", "groupmax"])
def test_invariances(activation):
    one = sae(activation)
    before, after = normal(40, WIDTH), normal(40, WIDTH, seed=1)
    same = latent_turnover(one, before, before)
    assert same.by_token == 0 and same.pooled() == 0 and not len(same.births()) and not len(same.deaths())
    found, back = latent_turnover(one, before, after), latent_turnover(one, after, before)
    assert 0 < found.by_token < 1 and 0 <= found.pooled(0.3) <= 1
    assert back.by_token == found.by_token and back.pooled(0.3) == found.pooled(0.3)
    assert torch.equal(back.births(0.3), found.deaths(0.3)) and torch.equal(back.deaths(0.3), found.births(0.3))
    parts = sum(latent_turnover(one, before[part], after[part]) for part in (slice(0, 7), slice(7, 40)))
    assert torch.equal(parts.before, found.before) and parts.by_token == pytest.approx(found.by_token, abs=1e-14)
    disjoint = latent_turnover(identity(5), on({0, 1}, {2}), on({2}, {0, 1}))
    assert disjoint.by_token == 1


def test_bf16_states_are_encoded_as_the_sae_does():
    before, after = normal(30, WIDTH).bfloat16(), normal(30, WIDTH, seed=1).bfloat16()
    found = latent_turnover(sae(), before, after)
    assert found.after.tolist() == (sae().encode(after) > 0).sum(0).tolist()


def test_an_sae_that_is_never_on_has_no_turnover():
    nothing = on(set(), set())
    found = latent_turnover(identity(5), nothing, nothing)
    assert math.isnan(found.by_token) and math.isnan(found.pooled()) and found.silent == 2


def test_refusals_name_the_argument():
    one, states = sae(), normal(2, 3, WIDTH)
    with pytest.raises(ValueError, match=r"before: got \[2, 3, 31\], expected \[..., 32\]"):
        latent_turnover(one, states[..., 1:], states)
    with pytest.raises(ValueError, match=r"after: got torch.float32 \[1, 3, 32\], expected torch.float32 \[2, 3, 32\]"):
        latent_turnover(one, states, states[:1])
    with pytest.raises(ValueError, match="after: got torch.bfloat16"):
        latent_turnover(one, states, states.bfloat16())
    with pytest.raises(ValueError, match=r"mask: got torch.bool \[3\], expected bool \[2, 3\]"):
        latent_turnover(one, states, states, mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask: got torch.int64"):
        latent_turnover(one, states, states, mask=torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="no token counts"):
        latent_turnover(one, states, states, mask=torch.zeros(2, 3, dtype=torch.bool))
    broken = states.clone()
    broken[1, 2, 0] = math.inf
    with pytest.raises(ValueError, match="after: NaN or Inf"):
        latent_turnover(one, states, broken)
    keep = torch.ones(2, 3, dtype=torch.bool)
    keep[1, 2] = False
    assert latent_turnover(one, states, broken, mask=keep).by_token == 0
    turned = sae("groupmax").rows(range(LATENTS)[::-1])
    with pytest.raises(ValueError, match="sae: a groupmax with k=8"):
        latent_turnover(turned, states, states)
    for other in (sae("topk").rows(range(20)), dataclasses.replace(sae("topk"), k=None)):
        with pytest.raises(ValueError, match="sae: a topk with k="):
            latent_turnover(other, states, states)
    found = latent_turnover(one, states, states)
    for rate in (0, 1.5):
        with pytest.raises(ValueError, match="rate: got"):
            found.births(rate)
    with pytest.raises(ValueError, match="cannot merge 64 latents with 5"):
        found + latent_turnover(identity(5), on({0}), on({0}))
    with pytest.raises(TypeError):
        found + 1
