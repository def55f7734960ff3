"""make bench-micro: single calls of public functions on problems so small that the overhead of a call is what counts.

pytest-benchmark repeats and reports them. The least a call can cost is that of an op of stock torch, which stands
beside.
"""

import pytest
import torch

import lockin_fast

TOKENS, WIDTH, LATENTS = 4, 64, 20


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def rows(*shape):
    return torch.randn(*shape)


def per_latent():
    return rows(LATENTS, WIDTH), torch.zeros(LATENTS), torch.ones(LATENTS)


def test_stock_torch_linear(benchmark):
    benchmark(torch.nn.functional.linear, rows(TOKENS, WIDTH), rows(LATENTS, WIDTH))


def test_block_penalty(benchmark):
    benchmark(lockin_fast.block_penalty, rows(TOKENS, WIDTH), *per_latent(), h_ref=rows(TOKENS, WIDTH))


@pytest.mark.parametrize("function", ["block_penalty", "block_penalty_tap"])
def test_penalty_forward_and_backward(benchmark, function):
    h_ref, latents, penalise = rows(TOKENS, WIDTH), per_latent(), getattr(lockin_fast, function)

    def step():
        h = rows(TOKENS, WIDTH).requires_grad_() * 1.0
        out = penalise(h, *latents, h_ref=h_ref)
        total = out.total if function == "block_penalty" else out[1].total + 0.0 * out[0].sum()
        total.backward()

    benchmark(step)


def test_encode_latents(benchmark):
    weight, bias, _ = per_latent()
    benchmark(lockin_fast.encode_latents, rows(TOKENS, WIDTH), weight, bias)


def test_encode_topk(benchmark):
    weight, bias, _ = per_latent()
    benchmark(lockin_fast.encode_topk, rows(TOKENS, WIDTH), weight, bias, 4)


def test_latent_stats(benchmark):
    weight, bias, _ = per_latent()
    benchmark(lockin_fast.latent_stats, rows(TOKENS, WIDTH), weight, bias)
