"""The other libraries compute what ours does, or a comparison of times would mean nothing."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import peers  # noqa: E402

pytestmark = pytest.mark.peers


@pytest.fixture
def problem():
    torch.manual_seed(0)
    return torch.randn(9, 48), torch.randn(64, 48) / 7, torch.randn(64) / 3


def test_encoders_agree(problem):
    h, weight, bias = problem
    encoders = peers.sae_encoders(weight, bias)
    assert set(encoders) == {"sae-lens", "dictionary-learning"}
    for encode in encoders.values():
        torch.testing.assert_close(encode(h), torch.relu(h @ weight.t() + bias))


def test_top_k_encoders_agree(problem):
    h, weight, bias = problem
    encoders = peers.topk_encoders(weight, bias, 5)
    assert set(encoders) == {"eai-sparsify", "sae-lens"}
    z = torch.relu(h @ weight.t() + bias)
    values, indices = z.topk(5)
    dense = torch.zeros_like(z).scatter_(1, indices, values)
    for encode in encoders.values():
        code = encode(h)
        if isinstance(code, tuple):
            code = torch.zeros_like(z).scatter_(1, code[1], code[0])
        torch.testing.assert_close(code.to_dense() if code.is_sparse else code, dense)


def test_nf4_goes_there_and_back(problem):
    ((quantise, dequantise),) = peers.nf4().values()
    h = torch.randn(8, 128)
    error = (dequantise(quantise(h)) - h).square().mean().sqrt() / h.square().mean().sqrt()
    assert 0.05 < error < 0.15
