"""BlockPenalty: the formula, the rows it keeps, and what it refuses."""

import subprocess
import sys
from dataclasses import replace

import pytest
import tiny_llama as tiny
import torch

from lockin_fast.blocking import BlockPenalty, LatentSet


def naive(h, h_ref, mask, *, threshold=None, margin=0.0):
    """The definition in fp64: sum over masked tokens and latents of relu(s (z - zref) - margin)^2."""
    chosen = tiny.sae(threshold=threshold is not None).rows(tiny.LATENT_SET.indices)

    def encode(x):
        pre = x.double() @ chosen.weight.double().T + chosen.bias.double()
        z = pre.relu()
        return z if threshold is None else z * (pre > chosen.threshold)

    excess = (tiny.LATENT_SET.signs * (encode(h) - encode(h_ref)) - margin).relu()
    return excess.square().sum(-1)[mask].sum()


@pytest.mark.parametrize("gate", ["relu", "sae"])
@pytest.mark.parametrize("margin", [None, 0.1])
def test_total_is_the_definition(gate, margin):
    torch.manual_seed(0)
    h, h_ref, mask = torch.randn(2, 7, tiny.WIDTH), torch.randn(2, 7, tiny.WIDTH), torch.rand(2, 7) > 0.3
    threshold = "own" if gate == "sae" else None
    sae = tiny.sae(threshold=gate == "sae")
    measured = BlockPenalty(sae, tiny.LATENT_SET, 1, 1.0, gate=gate, margin=margin)(h, h_ref=h_ref, mask=mask)
    expected = naive(h, h_ref, mask, threshold=threshold, margin=margin or 0.0)
    # fp32 against fp64: a sum of squares of d-term products, d ulps of its size at most.
    torch.testing.assert_close(measured.total.double(), expected, rtol=tiny.WIDTH * 2**-23, atol=0)
    assert measured.tokens == mask.sum() and measured.active > 0


def test_per_token_norms_of_the_sae_are_applied_to_both_streams():
    torch.manual_seed(0)
    h, h_ref = torch.randn(5, tiny.WIDTH), torch.randn(5, tiny.WIDTH)
    sae = replace(tiny.sae(), normalization="constant_norm_rescale")
    block = BlockPenalty(sae, tiny.LATENT_SET, 1, 1.0)
    assert block(h, h_ref=h_ref).total > 0
    torch.testing.assert_close(block(3 * h, h_ref=5 * h_ref).total, block(h, h_ref=h_ref).total, rtol=1e-5, atol=0)
    plain = BlockPenalty(tiny.sae(), tiny.LATENT_SET, 1, 1.0)
    torch.testing.assert_close(block(h, h_ref=h_ref).total, plain(sae.normalize(h), h_ref=sae.normalize(h_ref)).total)


def test_only_the_chosen_rows_are_kept_and_cast_once():
    block = tiny.penalty()
    rows = block.rows(torch.bfloat16, torch.device("cpu"))
    assert rows.weight.shape == (len(tiny.LATENT_SET), tiny.WIDTH) and rows.weight.is_contiguous()
    assert rows.weight.dtype == torch.bfloat16 and rows.bias.dtype == torch.float32
    assert block.rows(torch.bfloat16, torch.device("cpu")) is rows
    full = block.rows(torch.float32, torch.device("cpu"))
    assert torch.equal(full.weight, tiny.sae().weight[tiny.LATENT_SET.indices])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"latents": LatentSet((3, 64))}, ValueError, "index 64 is out of range; the SAE has latents 0 to 63"),
        ({"latents": LatentSet(())}, ValueError, "latents: got an empty set"),
        ({"latents": [1, 2]}, TypeError, "latents: got list, expected a LatentSet"),
        ({"latents": LatentSet((1,), layer=2)}, ValueError, "layer: got 1, but the latents were chosen at layer 2"),
        ({"layer": -1}, ValueError, "layer: got -1"),
        ({"layer": 1.0}, ValueError, "layer: got 1.0"),
        ({"weight": -1.0}, ValueError, "weight: got -1.0"),
        ({"weight": float("nan")}, ValueError, "weight: got nan"),
        ({"tokens": "assistant"}, ValueError, "tokens: got 'assistant', expected one of supervised, all"),
        ({"latent_reduction": "max"}, ValueError, "latent_reduction: got 'max'"),
        ({"gate": "jump"}, ValueError, "gate: got 'jump'"),
        ({"reference": "base"}, ValueError, "reference: got 'base'"),
        ({"margin": -0.1}, ValueError, "margin: got"),
        ({"margin": [0.1, 0.2]}, ValueError, "margin: got 2 numbers, expected one, or one for each of 6 latents"),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    arguments = {"sae": tiny.sae(), "latents": tiny.LATENT_SET, "layer": 1, "weight": 1.0} | change
    with pytest.raises(error, match=message):
        BlockPenalty(**arguments)


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_the_gate_of_a_top_k_sae_is_refused(activation):
    sae = replace(tiny.sae(), activation=activation, k=4)
    with pytest.raises(ValueError, match=f"{activation} SAE needs all 64 pre-activations"):
        BlockPenalty(sae, tiny.LATENT_SET, 1, 1.0, gate="sae")
    BlockPenalty(sae, tiny.LATENT_SET, 1, 1.0)


def test_nan_in_the_sae_is_refused():
    weight = tiny.sae().weight.clone()
    weight[3, 0] = float("nan")
    with pytest.raises(ValueError, match="weight holds NaN"):
        BlockPenalty(replace(tiny.sae(), weight=weight), tiny.LATENT_SET, 1, 1.0)


def test_latent_sets_and_penalties_need_no_transformers():
    code = (
        "import sys; from lockin_fast.blocking import BlockPenalty, LatentSet; import lockin_fast.blocking.reference;"
        "sys.exit('transformers' in sys.modules or 'peft' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
