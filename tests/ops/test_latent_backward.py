import pytest
import torch
from penalty_oracle import assert_as_good_as_torch
from threads import on_threads

from lockin_fast.ops.latent_backward import latent_backward, latent_backward_

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 48, 1), (7, 123, 13), (64, 48, 20), (33, 2304, 20), (37, 123, 100), (3, 4096, 13), (5, 1, 2)]


def inputs(tokens, width, latents, dtype, density=0.2, seed=0):
    make = torch.Generator().manual_seed(seed)
    coefficient = torch.randn(tokens, latents, generator=make)
    coefficient *= torch.rand(tokens, latents, generator=make) < density
    scale = torch.randn(tokens, generator=make)
    weight = torch.randn(latents, width, generator=make).to(dtype)
    grad = torch.randn(tokens, width, generator=make).to(dtype)
    return coefficient, scale, weight, grad


@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_good_as_plain_torch(dtype, shape, density, poisoned_memory):
    coefficient, scale, weight, grad = inputs(*shape, dtype, density)
    product = (scale[:, None] * coefficient).double() @ weight.double()
    eager = (scale[:, None] * coefficient) @ weight.float()
    assert_as_good_as_torch("alone", latent_backward(coefficient, scale, weight), product, eager.to(dtype))
    added = latent_backward(coefficient, scale, weight, grad)
    assert_as_good_as_torch("added", added, grad.double() + product, (grad.float() + eager).to(dtype))
    assert torch.equal(latent_backward_(grad.clone(), coefficient, scale, weight), added)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quiet_tokens_are_untouched(dtype):
    coefficient, scale, weight, grad = inputs(40, 123, 13, dtype)
    coefficient[::3] = 0.0
    scale[3], scale[6] = torch.nan, torch.inf
    grad[9, 4] = torch.nan
    out = latent_backward(coefficient, scale, weight, grad)
    over = latent_backward_(grad.clone(), coefficient, scale, weight)
    assert torch.equal(out.nan_to_num(7.0)[::3], grad.nan_to_num(7.0)[::3])
    assert torch.equal(over.nan_to_num(7.0)[::3], grad.nan_to_num(7.0)[::3])
    assert not latent_backward(coefficient, scale, weight)[::3].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nonfinite_upstream_and_coefficients_propagate(dtype):
    coefficient, scale, weight, grad = inputs(8, 48, 5, dtype, density=1.0)
    scale[2], coefficient[4, 1] = torch.nan, torch.inf
    out = latent_backward(coefficient, scale, weight, grad)
    finite = out.isfinite()
    assert not finite[2].any() and not finite[4].any() and finite[[0, 1, 3, 5, 6, 7]].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype):
    coefficient, scale, weight, grad = inputs(24, 48, 13, dtype)
    expected = latent_backward(coefficient, torch.full((24,), 2.0), weight, grad)
    expanded = torch.tensor([2.0] + [torch.nan] * 23)[:1].expand(24)
    wide = torch.full((24, 100), 5.0, dtype=dtype)
    wide[:, 20:68] = grad
    assert torch.equal(latent_backward(coefficient, expanded, weight, wide[:, 20:68]), expected)
    assert torch.equal(latent_backward(coefficient.t().contiguous().t(), expanded, weight, grad), expected)
    latent_backward_(wide[:, 20:68], coefficient, expanded, weight)
    assert torch.equal(wide[:, 20:68], expected)
    assert (wide[:, :20] == 5.0).all() and (wide[:, 68:] == 5.0).all()


@pytest.mark.parametrize(("tokens", "latents"), [(0, 5), (4, 0), (0, 0)])
def test_no_tokens_or_no_latents(tokens, latents, poisoned_memory):
    coefficient, scale, weight, grad = inputs(tokens, 48, latents, torch.float32)
    assert not latent_backward(coefficient, scale, weight).any()
    assert torch.equal(latent_backward(coefficient, scale, weight, grad), grad)
    assert torch.equal(latent_backward_(grad.clone(), coefficient, scale, weight), grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_and_independent_of_threads(dtype):
    coefficient, scale, weight, grad = inputs(70, 123, 20, dtype)
    with on_threads(3):
        first = latent_backward(coefficient, scale, weight, grad)
    with on_threads(1):
        again = latent_backward(coefficient, scale, weight, grad)
    assert torch.equal(first, again)
