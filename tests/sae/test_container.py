"""The container: its checks, row selection, casts, per-token norms, gradients."""

import math
from dataclasses import replace

import pytest
import torch

from lockin_fast.sae import SparseAutoencoder

K, D = 13, 48


def make(**fields):
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "weight": torch.randn(K, D, generator=generator) / math.sqrt(D),
        "bias": torch.randn(K, generator=generator) * 0.1,
        "decoder": torch.randn(K, D, generator=generator),
        "decoder_bias": torch.randn(D, generator=generator),
    }
    return SparseAutoencoder(**tensors | fields)


def with_value(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[1] = value
    return tensor


BAD = {
    "weight must be a tensor": {"weight": torch.zeros(D)},
    "weight must be torch.float64": {"weight": torch.zeros(K, D, dtype=torch.int32)},
    "bias must be a tensor of shape \\[13\\], got shape \\[12\\]": {"bias": torch.zeros(K - 1)},
    "bias must be torch.float32": {"bias": torch.zeros(K, dtype=torch.bfloat16)},
    "decoder must be a tensor of shape": {"decoder": torch.zeros(D, K)},
    "decoder must be torch.float32, got torch.float16": {"decoder": torch.zeros(K, D, dtype=torch.float16)},
    "decoder_bias must be": {"decoder_bias": torch.zeros(K)},
    "weight holds NaN": {"weight": with_value(torch.zeros(K, D), float("nan"))},
    "bias holds NaN or Inf": {"bias": with_value(torch.zeros(K), float("inf"))},
    "decoder holds NaN": {"decoder": with_value(torch.zeros(K, D), float("-inf"))},
    "threshold holds NaN": {"activation": "jumprelu", "threshold": with_value(torch.zeros(K), float("nan"))},
    "needs a threshold": {"activation": "jumprelu"},
    "has no threshold": {"threshold": torch.zeros(K)},
    "activation must be one of": {"activation": "abstopk"},
    "normalization must be one of": {"normalization": "batch_norm"},
    "needs a k that divides the width 13, got 3": {"activation": "groupmax", "k": 3},
    "needs a k that divides the width 13, got None": {"activation": "groupmax"},
    "k must be an integer from 1 to the width 13, got 14": {"activation": "topk", "k": 14},
    "width must be": {"width": K - 1},
    "latents must name the 13 rows": {"width": 100},
    "index 100 is out of range": {"width": 100, "latents": torch.arange(88, 101)},
    "index 5 occurs more than once": {"width": 100, "latents": torch.tensor([*range(12), 5])},
}


@pytest.mark.parametrize("message", BAD)
def test_rejects(message):
    with pytest.raises(ValueError, match=message) as raised:
        make(**BAD[message])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("latents", [[-1], [K], [0, 0], [0.5], [[1, 2]], torch.ones(K, dtype=torch.bool)])
def test_rows_rejects(latents):
    with pytest.raises(ValueError, match="latents"):
        make().rows(latents)


def test_rows_of_rows_speak_of_the_original_latents():
    sae = make()
    few = sae.rows([11, 2, 5])
    fewer = few.rows(torch.tensor([5, 11]))
    assert fewer.latents.tolist() == [5, 11] and fewer.width == K
    assert torch.equal(fewer.weight, sae.weight[[5, 11]])
    with pytest.raises(ValueError, match="7 is not among the 3 latents"):
        few.rows([7])


def test_no_latents_at_all():
    empty = make().rows([])
    assert empty.encode(torch.randn(2, 3, D)).shape == (2, 3, 0)
    assert torch.equal(empty.decode(torch.zeros(2, 0)), empty.decoder_bias.expand(2, D))


def test_frozen():
    with pytest.raises(AttributeError):
        make().bias = torch.zeros(K)


def test_to_casts_rows_and_keeps_bias_and_threshold():
    sae = make(activation="jumprelu", threshold=torch.rand(K)).to(dtype=torch.bfloat16)
    assert sae.weight.dtype == sae.decoder.dtype == sae.decoder_bias.dtype == sae.dtype == torch.bfloat16
    assert sae.bias.dtype == sae.threshold.dtype == torch.float32


def test_to_names_what_overflows():
    with pytest.raises(ValueError, match="decoder overflows torch.float16"):
        make(decoder=torch.full((K, D), 1e6)).to(dtype=torch.float16)


def test_topk_needs_every_row():
    sae, x = make(activation="topk", k=3), torch.randn(5, D)
    assert ((sae.encode(x) > 0).sum(dim=-1) <= 3).all()
    part = sae.rows(range(6))
    with pytest.raises(ValueError, match="topk with k=3 needs all 13 latents in order, but 6 were read"):
        part.encode(x)
    assert torch.equal(part.encode_latents(x), sae.encode_latents(x)[:, :6])
    with pytest.raises(ValueError, match="in order"):
        sae.rows(range(12, -1, -1)).encode(x)
    assert torch.equal(sae.rows(range(13)).encode(x), sae.encode(x))


def test_groupmax_keeps_the_largest_of_every_group_of_neighbours():
    sae, x = make(), torch.randn(5, D)
    few = replace(sae.rows(range(12)), width=12, latents=None, activation="groupmax", k=4)
    dense, kept = few.encode_latents(x).view(5, 4, 3), few.encode(x).view(5, 4, 3)
    assert torch.equal(kept.amax(-1), dense.amax(-1)) and ((kept > 0).sum(-1) <= 1).all() and (kept > 0).any()
    with pytest.raises(ValueError, match="groupmax with k=4 needs all 12 latents in order, but 3 were read"):
        few.rows([0, 1, 2]).encode(x)


def test_topk_of_unknown_k_has_its_dense_code_only():
    sae, x = make(activation="topk"), torch.randn(5, D)
    assert torch.equal(sae.encode_latents(x), make().encode_latents(x))
    with pytest.raises(ValueError, match="k of the top-k is not in the checkpoint"):
        sae.encode(x)
    assert torch.equal(replace(sae, k=3).encode(x), make(activation="topk", k=3).encode(x))


@pytest.mark.parametrize("normalization", ["constant_norm_rescale", "layer_norm"])
def test_token_norm_is_differentiable_and_undone_by_decode(normalization):
    sae = make(normalization=normalization)
    x = torch.randn(4, D) * 3 + 1
    scaled = sae.normalize(x)
    if normalization == "constant_norm_rescale":
        torch.testing.assert_close(scaled.norm(dim=-1), torch.full((4,), math.sqrt(D)))
    else:
        torch.testing.assert_close(scaled.mean(dim=-1), torch.zeros(4), atol=1e-6, rtol=0)
        torch.testing.assert_close(scaled.std(dim=-1), torch.ones(4), atol=2e-5, rtol=0)
    # A perfect reconstruction of the normalised stream decodes to the stream.
    perfect = replace(sae, weight=torch.eye(D), bias=torch.zeros(D), decoder=torch.eye(D), width=D)
    perfect = replace(perfect, decoder_bias=torch.zeros(D))
    torch.testing.assert_close(perfect.decode(scaled, x), x, atol=2e-4, rtol=1e-5)
    with pytest.raises(ValueError, match="needs x"):
        sae.decode(sae.encode(x))

    def loss(stream):
        return sae.encode_latents(stream).double().square().sum()

    probe = x.clone().requires_grad_()
    loss(probe).backward()
    direction = torch.randn(4, D)
    step = 1e-2
    slope = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    torch.testing.assert_close((probe.grad * direction).sum().double(), slope, rtol=2e-2, atol=1e-2)


def test_token_norm_keeps_a_half_precision_stream_in_its_dtype():
    sae = make(normalization="layer_norm")
    x = torch.randn(4, D).bfloat16() * 100
    assert sae.normalize(x).dtype == torch.bfloat16 and sae.encode(x).dtype == torch.float32


def test_metadata_and_repr_name_the_source():
    sae = make(metadata={"format": "goodfire"}).rows([1, 2])
    assert repr(sae) == "SparseAutoencoder(relu, 2 of 13 latents, d_model=48, torch.float32, cpu, goodfire)"
