import pytest
import torch
from penalty_oracle import FEW, assert_as_good_as_torch, clear_of_steps, encode, problem, rounding

import lockin_fast
from lockin_fast.ops import encode_latents as op_module
from lockin_fast.ops import latent_backward as backward_module

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 48, 1), (7, 123, 13), (64, 48, 20), (33, 2304, 20), (37, 123, 100), (3, 4096, 13), (5, 1, 2)]


@pytest.mark.parametrize("threshold", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_latents_and_gradient_are_as_good_as_plain_torch(dtype, shape, threshold):
    p = problem(*shape, dtype, threshold=threshold)
    clear = clear_of_steps(p, [p.h.double()])
    assert clear.float().mean() > 0.95
    upstream = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(1)) * clear

    def run(q, function):
        h = q.h.clone().requires_grad_()
        z = function(q, h)
        z.backward(upstream.to(z.dtype))
        return z.detach(), h.grad

    truth, truth_grad = run(p.at(torch.float64), encode)
    eager, eager_grad = run(p.at(torch.float32), encode)
    ours, ours_grad = run(p, lambda q, h: lockin_fast.encode_latents(h, q.weight, q.bias, threshold=q.threshold))
    assert ours.dtype is torch.float32 and ours_grad.dtype is dtype
    exact = p.at(torch.float64)  # z errs as its pre-activation does
    least = float(rounding(exact, exact.h)[clear].max()) if clear.sum() < FEW else 0.0
    assert_as_good_as_torch("z", ours, truth, eager, clear, least)
    assert_as_good_as_torch("gradient", ours_grad, truth_grad, eager_grad.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_leading_dimensions_strides_and_weight_dtype(dtype):
    p = problem(30, 48, 13, dtype)
    expected = lockin_fast.encode_latents(p.h, p.weight, p.bias)
    h = p.h.view(5, 6, 48)
    assert torch.equal(lockin_fast.encode_latents(h, p.weight.double(), p.bias), expected.view(5, 6, 13))
    one = lockin_fast.encode_latents(p.h[:1], p.weight, p.bias)
    assert torch.equal(lockin_fast.encode_latents(p.h[0], p.weight, p.bias), one[0])
    assert torch.equal(lockin_fast.encode_latents(p.h.t().contiguous().t(), p.weight, p.bias), expected)
    assert torch.equal(lockin_fast.encode_latents(p.h.repeat(1, 2)[:, :48], p.weight, p.bias), expected)


def test_threshold_of_minus_infinity_is_a_plain_relu_and_the_comparison_is_strict():
    p = problem(20, 48, 13, torch.float32)
    plain = lockin_fast.encode_latents(p.h, p.weight, p.bias)
    off = torch.full((13,), -torch.inf)
    assert torch.equal(lockin_fast.encode_latents(p.h, p.weight, p.bias, threshold=off), plain)
    half = torch.full((13,), 0.5)
    assert not lockin_fast.encode_latents(torch.zeros(2, 48), p.weight, half, threshold=half).any()


@pytest.mark.parametrize(("tokens", "latents"), [(0, 5), (4, 0), (0, 0)])
def test_no_tokens_or_no_latents(tokens, latents, poisoned_memory):
    p = problem(tokens, 48, latents, torch.float32)
    z = lockin_fast.encode_latents(p.h.requires_grad_(), p.weight, p.bias)
    z.sum().backward()
    assert z.shape == (tokens, latents) and p.h.grad.shape == p.h.shape and not p.h.grad.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_propagate_and_stay_in_their_token(dtype, poisoned_memory):
    p = problem(20, 48, 13, dtype, threshold=True)
    p.h[3, 5], p.h[4, 6] = torch.nan, torch.inf
    h = p.h.requires_grad_()
    z = lockin_fast.encode_latents(h, p.weight, p.bias, threshold=p.threshold)
    assert z[3].isnan().all() and (z[4] == torch.inf).any()
    others = torch.ones(20, dtype=torch.bool)
    others[3:5] = False
    assert z[others].isfinite().all()
    z.backward(torch.ones_like(z))
    assert h.grad[others].isfinite().all()


def test_gradient_formula_by_finite_differences():
    p = problem(6, 5, 4, torch.float64, threshold=True).at(torch.float64)
    assert clear_of_steps(p, [p.h]).all()

    class Reference(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            ctx.z = op_module.reference(h, p.weight, p.bias, p.threshold)
            return ctx.z

        @staticmethod
        def backward(ctx, grad):
            return backward_module.reference(grad.masked_fill(ctx.z <= 0, 0.0), grad.new_ones(6), p.weight, None)

    torch.autograd.gradcheck(Reference.apply, (p.h.requires_grad_(),))


def test_double_backward_and_unfrozen_weights_raise():
    p = problem(6, 48, 4, torch.float32)
    z = lockin_fast.encode_latents(p.h.requires_grad_(), p.weight, p.bias)
    (grad,) = torch.autograd.grad(z.square().sum(), p.h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    with pytest.raises(ValueError, match="^weight: requires grad"):
        lockin_fast.encode_latents(p.h, p.weight.requires_grad_(), p.bias)
    with pytest.raises(ValueError, match=r"^h: got shape \(6, 47\)"):
        lockin_fast.encode_latents(torch.zeros(6, 47), p.weight.detach(), p.bias)
    with pytest.raises(ValueError, match="^threshold: got shape"):
        lockin_fast.encode_latents(p.h, p.weight.detach(), p.bias, threshold=torch.zeros(3))
    with pytest.raises(TypeError, match="^bias: got NoneType, expected a tensor"):
        lockin_fast.encode_latents(p.h, p.weight.detach(), None)


@pytest.mark.parametrize("threshold", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_wide_weight_goes_through_tiles_and_gives_the_same(dtype, threshold, monkeypatch, poisoned_memory):
    p = problem(20, 123, 77, dtype, threshold=threshold)
    clear = clear_of_steps(p, [p.h.double()])
    results = []
    for limit in (2**24, 0):
        monkeypatch.setattr(op_module, "WIDE_BYTES", limit)
        monkeypatch.setattr(op_module, "TILE_ELEMENTS", 123 * 10)
        h = p.h.clone().requires_grad_()
        z = lockin_fast.encode_latents(h, p.weight, p.bias, threshold=p.threshold)
        (z * clear).sum().backward()
        results.append((z.detach() * clear, h.grad))
    for narrow, wide in zip(*results, strict=True):
        torch.testing.assert_close(narrow, wide)
