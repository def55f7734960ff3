import re

import pytest
import torch
from penalty_oracle import FEW, assert_as_good_as_torch, clear_of_steps, penalty_rounding, per_token_penalty, problem
from threads import on_threads

import lockin_fast
from lockin_fast.ops import block_penalty as op_module
from lockin_fast.ops import latent_backward as backward_module

op = torch.ops.lockin_fast.block_penalty.default
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 48, 1), (7, 123, 13), (64, 48, 20), (33, 2304, 20), (37, 123, 100), (3, 4096, 13), (5, 1, 2)]
OPTIONS = [
    {"ref": "h"},
    {"ref": "z", "masked": True},
    {"ref": "h", "masked": True, "threshold": True, "margin": True},
    {"ref": "z", "threshold": True, "mean": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_penalty_and_gradient_are_as_good_as_plain_torch(dtype, shape, options):
    p = problem(*shape, dtype, **options)
    clear = clear_of_steps(p)
    usable = clear.all(1)
    assert usable.float().mean() > 0.8
    upstream = torch.randn(shape[0], generator=torch.Generator().manual_seed(1))

    def run(q, h, function, cotangent):
        h = h.clone().requires_grad_()
        value = function(q, h)
        value.backward(cotangent.to(value.dtype))
        return value.detach(), h.grad

    truth, truth_grad = run(p.at(torch.float64), p.h.double(), per_token_penalty, upstream)
    eager, eager_grad = run(p.at(torch.float32), p.h.float(), per_token_penalty, upstream)
    ours, ours_grad = run(p, p.h, lambda q, h: op_module.PerTokenPenalty.apply(h, *q.op_arguments[1:])[0], upstream)
    assert ours.dtype is torch.float32 and ours_grad.dtype is dtype
    least = least_grad = 0.0
    if usable.sum() < FEW:
        least, slope = penalty_rounding(p)
        least_grad = slope * upstream.abs()[:, None] + torch.finfo(dtype).eps * truth_grad.abs()  # rounded to its dtype
        least, least_grad = float(least[usable].max()), float(least_grad[usable].max())
    assert_as_good_as_torch("per_token", ours, truth, eager, usable, least)
    of_usable = usable[:, None].expand_as(p.h)
    assert_as_good_as_torch("gradient", ours_grad, truth_grad, eager_grad.to(dtype), of_usable, least_grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_public_function_sums_the_tokens(dtype):
    p = problem(30, 48, 13, dtype, masked=True, margin=True)
    h = p.h.view(5, 6, 48).requires_grad_()
    options = p.options | {"h_ref": p.h_ref.view(5, 6, 48), "mask": p.mask.view(5, 6)}
    penalty = lockin_fast.block_penalty(h, p.weight.double(), p.bias.double(), p.sign, **options)
    per_token, coefficient, active = op(*p.op_arguments)
    assert penalty.total.dtype is torch.float32 and penalty.tokens.dtype is penalty.active.dtype is torch.int64
    torch.testing.assert_close(penalty.total, per_token.sum(), rtol=1e-6, atol=0)
    assert penalty.tokens == p.mask.sum() and penalty.active == active
    assert active == (coefficient != 0).sum() or (p.sign < 0).any()
    (3.0 * penalty.total).backward()
    scale = torch.full((30,), 3.0)
    torch.testing.assert_close(h.grad.view(30, 48), backward_module.reference(coefficient, scale, p.weight, None))


def test_active_pairs_are_counted():
    p = problem(40, 48, 20, torch.float32, masked=True, margin=True)
    exact = p.at(torch.float64)
    z, z_ref = ((x @ exact.weight.t() + exact.bias).relu() for x in (exact.h, exact.h_ref))
    excess = exact.sign * (z - z_ref) - exact.margin
    assert (excess.abs()[p.mask] > 1e-5).all()
    assert op(*p.op_arguments)[2] == (excess[p.mask] > 0).sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_reference_equal_to_h_gives_exactly_zero(dtype, masked):
    p = problem(50, 123, 20, dtype, masked=masked, threshold=True)
    wide = torch.randn(50, 200).to(dtype)
    wide[:, :123] = p.h
    for h_ref in (p.h, p.h.clone(), wide[:, :123]):
        h = p.h.clone().requires_grad_()
        penalty = lockin_fast.block_penalty(h, p.weight, p.bias, p.sign, **(p.options | {"h_ref": h_ref}))
        penalty.total.backward()
        assert penalty.total == 0.0 and penalty.active == 0 and not h.grad.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_active_and_none_active(dtype):
    p = problem(20, 48, 13, dtype, ref="z")
    p.z_ref.zero_()
    p.sign.fill_(1.0)
    p.bias.fill_(20.0)
    assert op(*p.op_arguments)[2] == 20 * 13
    p.bias.fill_(-20.0)
    per_token, coefficient, active = op(*p.op_arguments)
    assert active == 0 and not per_token.any() and not coefficient.any()


@pytest.mark.parametrize(("tokens", "latents"), [(0, 5), (4, 0), (0, 0)])
@pytest.mark.parametrize("ref", ["h", "z"])
@pytest.mark.parametrize("mean", [False, True])
def test_no_tokens_or_no_latents(tokens, latents, ref, mean, poisoned_memory):
    p = problem(tokens, 48, latents, torch.float32, ref=ref, mean=mean)
    h = p.h.requires_grad_()
    penalty = lockin_fast.block_penalty(h, p.weight, p.bias, p.sign, **p.options)
    penalty.total.backward()
    assert penalty.total == 0.0 and penalty.tokens == tokens and penalty.active == 0
    assert h.grad.shape == h.shape and not h.grad.any()


def test_empty_mask_gives_exact_zeros(poisoned_memory):
    p = problem(20, 48, 13, torch.float32)
    h = p.h.requires_grad_()
    penalty = lockin_fast.block_penalty(
        h, p.weight, p.bias, p.sign, h_ref=p.h_ref, mask=torch.zeros(20, dtype=torch.bool)
    )
    penalty.total.backward()
    assert penalty == (0.0, 0, 0) and not h.grad.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_transposed_inputs(dtype):
    p = problem(24, 48, 13, dtype, masked=True)
    expected = op(*p.op_arguments)
    wide = torch.full((24, 96), torch.nan, dtype=dtype)
    wide[:, :48] = p.h
    apart = torch.full((48, 48), torch.nan, dtype=dtype)
    apart[::2] = p.h
    for h in (wide[:, :48], p.h.t().contiguous().t(), apart[::2]):
        penalty = lockin_fast.block_penalty(h, p.weight.t().contiguous().t(), p.bias, p.sign, **p.options)
        assert torch.equal(penalty.total, expected[0].sum()) and penalty.active == expected[2]
    mask = torch.stack([p.mask, ~p.mask], 1)[:, 0]
    penalty = lockin_fast.block_penalty(p.h, p.weight, p.bias, p.sign, **(p.options | {"mask": mask}))
    assert torch.equal(penalty.total, expected[0].sum())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["h", "h_ref", "z_ref"])
def test_nan_and_inf_reach_the_loss_unless_masked(bad, dtype, where):
    p = problem(20, 48, 13, dtype, ref="z" if where == "z_ref" else "h")
    getattr(p, where)[3, 5] = bad
    if where != "h":
        p.sign.copy_(torch.tensor([1.0, -1.0]).repeat(7)[:13])
    per_token, _, _ = op(*p.op_arguments)
    assert not per_token[3].isfinite() and per_token.isfinite().sum() == 19

    mask = torch.ones(20, dtype=torch.bool)
    mask[3] = False
    h = p.h.requires_grad_()
    penalty = lockin_fast.block_penalty(h, p.weight, p.bias, p.sign, **(p.options | {"mask": mask}))
    penalty.total.backward()
    assert penalty.total.isfinite() and h.grad.isfinite().all() and not h.grad[3].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_output_is_left_unwritten(dtype, poisoned_memory):
    for options in OPTIONS:
        p = problem(37, 123, 20, dtype, **options)
        outputs = op(*p.op_arguments)
        assert all(x.isfinite().all() for x in outputs[:2]) and 0 <= outputs[2] <= 37 * 20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_and_independent_of_threads(dtype):
    p = problem(70, 123, 20, dtype, masked=True)
    with on_threads(3):
        first = op(*p.op_arguments)
    with on_threads(1):
        again = op(*p.op_arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_gradient_formula_by_finite_differences():
    p = problem(6, 5, 4, torch.float64, masked=True, margin=True, threshold=True, mean=True).at(torch.float64)
    assert clear_of_steps(p).all()

    class Reference(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            per_token, ctx.coefficient, _ = op_module.reference(h, *p.op_arguments[1:])
            return per_token

        @staticmethod
        def backward(ctx, scale):
            return backward_module.reference(ctx.coefficient, scale, p.weight, None)

    h = p.h.requires_grad_()
    assert per_token_penalty(p, h).sum() > 0
    torch.autograd.gradcheck(Reference.apply, (h,))
    torch.testing.assert_close(Reference.apply(h), per_token_penalty(p, h))


def test_double_backward_raises():
    p = problem(6, 48, 4, torch.float32)
    total = lockin_fast.block_penalty(p.h.requires_grad_(), p.weight, p.bias, p.sign, h_ref=p.h_ref).total
    (grad,) = torch.autograd.grad(total * total, p.h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_autocast_changes_nothing():
    p = problem(20, 48, 13, torch.float32)
    expected = op(*p.op_arguments)
    with torch.autocast("cpu", torch.bfloat16):
        ours = op(*p.op_arguments)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def _arguments(**changes):
    p = problem(6, 48, 4, torch.float32)
    given = {"h": p.h, "weight": p.weight, "bias": p.bias, "sign": p.sign, "h_ref": p.h_ref} | changes
    return [given.pop(name) for name in ("h", "weight", "bias", "sign")], given


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"h": torch.zeros(6, 47)}, ValueError, "h: got shape (6, 47), expected [..., 48]"),
        ({"h": torch.zeros(6, 48, dtype=torch.float64)}, TypeError, "h: got torch.float64"),
        ({"h": [1.0]}, TypeError, "h: got list, expected a tensor [..., 48]"),
        ({"weight": None}, TypeError, "weight: got NoneType, expected a tensor of rows [K, d]"),
        ({"bias": None}, TypeError, "bias: got NoneType, expected a tensor [4], one value per row of weight"),
        ({"sign": [1, 1, -1, 1]}, TypeError, "sign: got list, expected a tensor [4]"),
        ({"sign": None}, TypeError, "sign: got NoneType, expected a tensor [4]"),
        ({"margin": 0.5}, TypeError, "margin: got float, expected a tensor [4], one value per row of weight, or None"),
        ({"threshold": [0.0] * 4}, TypeError, "threshold: got list, expected a tensor [4]"),
        ({"h_ref": [0.0]}, TypeError, "h_ref: got list, expected a tensor of the shape and dtype of h"),
        ({"h_ref": None, "z_ref": 0.0}, TypeError, "z_ref: got float, expected a tensor [..., 4]"),
        ({"mask": [True] * 6}, TypeError, "mask: got list, expected a tensor of bool [...]"),
        ({"weight": torch.zeros(48)}, ValueError, "weight: got torch.float32 (48,)"),
        ({"weight": torch.zeros(4, 48, dtype=torch.uint8)}, ValueError, "weight: got torch.uint8"),
        ({"weight": torch.zeros(4, 48, requires_grad=True)}, ValueError, "weight: requires grad"),
        ({"bias": torch.zeros(4, requires_grad=True)}, ValueError, "bias: requires grad"),
        ({"bias": torch.zeros(5)}, ValueError, "bias: got shape (5,), expected [4]"),
        ({"sign": torch.zeros(3)}, ValueError, "sign: got shape (3,)"),
        ({"margin": torch.zeros(4, 1)}, ValueError, "margin: got shape (4, 1)"),
        ({"threshold": torch.zeros(())}, ValueError, "threshold: got shape ()"),
        ({"h_ref": None}, ValueError, "z_ref, h_ref: got neither"),
        ({"z_ref": torch.zeros(6, 4)}, ValueError, "z_ref, h_ref: got both"),
        ({"h_ref": None, "z_ref": torch.zeros(6, 5)}, ValueError, "z_ref: got shape (6, 5), expected (6, 4)"),
        ({"h_ref": torch.zeros(5, 48)}, ValueError, "h_ref: got torch.float32 (5, 48)"),
        ({"h_ref": torch.zeros(6, 48, dtype=torch.bfloat16)}, ValueError, "h_ref: got torch.bfloat16"),
        ({"mask": torch.ones(6)}, TypeError, "mask: got torch.float32, expected bool"),
        ({"mask": torch.ones(6, 1, dtype=torch.bool)}, ValueError, "mask: got shape (6, 1), expected (6,)"),
        ({"latent_reduction": "max"}, ValueError, "latent_reduction: got 'max'"),
        ({"sign": torch.zeros(4, device="meta")}, ValueError, "sign: is on meta, but h is on cpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_name_the_argument(changes, error, text):
    positional, keywords = _arguments(**changes)
    for function in (lockin_fast.block_penalty, lockin_fast.block_penalty_tap):
        with pytest.raises(error, match="^" + re.escape(text)):
            function(*positional, **keywords)


def test_frozen_weights_that_require_grad_are_fine_without_grad():
    positional, keywords = _arguments(weight=torch.zeros(4, 48, requires_grad=True))
    with torch.no_grad():
        assert lockin_fast.block_penalty(*positional, **keywords).total == 0.0
