"""block_penalty with a reference in NF4: by definition what it is on the dequantised reference."""

import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from penalty_oracle import assert_as_good_as_torch, clear_of_steps, per_token_penalty, problem
from threads import on_threads
from torch._subclasses.fake_tensor import FakeTensorMode

import lockin_fast
from lockin_fast.ops import block_penalty as dense_module

dense, op = torch.ops.lockin_fast.block_penalty.default, torch.ops.lockin_fast.block_penalty_nf4.default
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# tokens, width, latents, blocksize
SHAPES = [(1, 16, 1, 16), (7, 48, 13, 16), (64, 192, 20, 64), (9, 2304, 20, 256), (37, 128, 99, 32), (3, 4096, 13, 64)]
OPTIONS = [{}, {"masked": True}, {"threshold": True, "margin": True}, {"masked": True, "threshold": True, "mean": True}]
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
interpreted = "TRITON_INTERPRET" in os.environ


def packed_problem(tokens, width, latents, dtype, blocksize=16, outliers=2, **options):
    """A problem whose reference holds outlier channels, with that reference in NF4 and, in the problem, decoded."""
    p = problem(tokens, width, latents, dtype, **options)
    p.h_ref[:, [0, width - 1]] *= 20
    packed = lockin_fast.quantize_nf4(p.h_ref, blocksize=blocksize, outliers=outliers)
    p.h_ref = packed.dequantize()
    return p, packed


def arguments(p, packed):
    *operands, blocksize = packed.operands(p.h.dtype)
    return p.h, p.weight, p.bias, p.sign, *operands, p.mask, p.threshold, p.margin, p.mean, blocksize


def same(got, want):
    """Equal to the bit, where one code computes both; interpreted, products of tiles of another width are not."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **({} if interpreted else {"rtol": 0, "atol": 0}), equal_nan=True)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_on_the_dequantised_reference(dtype, shape, options, poisoned_memory):
    *sizes, blocksize = shape
    for outliers in (0, 2):
        p, packed = packed_problem(*sizes, dtype, blocksize, outliers, **options)
        clear = clear_of_steps(p)
        got, want = op(*arguments(p, packed)), dense(*p.op_arguments)
        if interpreted:
            got, want = [(x[0][clear.all(1)], x[1][clear]) for x in (got, want)]
        same(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_penalty_is_as_good_as_plain_torch(dtype):
    p, packed = packed_problem(40, 192, 20, dtype, 64, threshold=True, margin=True)
    usable = clear_of_steps(p).all(1)
    assert usable.float().mean() > 0.8
    truth, eager = (per_token_penalty(p.at(kind), p.h.to(kind)) for kind in (torch.float64, torch.float32))
    assert_as_good_as_torch("per_token", op(*arguments(p, packed))[0], truth, eager, usable)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tapped", [False, True])
def test_public_functions_take_it_as_h_ref(dtype, tapped):
    p, packed = packed_problem(30, 48, 13, dtype, masked=True)
    results = []
    for h_ref in (packed, p.h_ref):
        h = p.h.clone().requires_grad_()
        x, rest = h * 1.0, {"mask": p.mask, "h_ref": h_ref}
        if tapped:
            x, penalty = lockin_fast.block_penalty_tap(x, p.weight, p.bias, p.sign, **rest)
        else:
            penalty = lockin_fast.block_penalty(x, p.weight, p.bias, p.sign, **rest)
        (x.float().square().sum() + 2.0 * penalty.total).backward()
        results.append((*penalty, h.grad))
    same(*results)
    assert results[0][0] > 0 and results[0][1] == p.mask.sum() and results[0][2] > 0
    with torch.no_grad():
        again = lockin_fast.block_penalty(p.h, p.weight, p.bias, p.sign, h_ref=packed, mask=p.mask)
    assert torch.equal(again.total, results[0][0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_leading_dimensions_strides_and_another_dtype(dtype):
    p, packed = packed_problem(24, 48, 13, torch.float32)
    h = p.h.to(dtype)
    want = lockin_fast.block_penalty(h, p.weight, p.bias, p.sign, h_ref=packed.dequantize(dtype))
    shaped = lockin_fast.quantize_nf4(problem(24, 48, 13, torch.float32).h_ref.view(4, 6, 48), blocksize=16)
    assert shaped.shape == (4, 6, 48)
    lockin_fast.block_penalty(h.view(4, 6, 48), p.weight, p.bias, p.sign, h_ref=shaped)
    for same_h in (h, h.repeat(1, 2)[:, :48], h.t().contiguous().t(), h.repeat_interleave(2, 0)[::2]):
        got = lockin_fast.block_penalty(same_h, p.weight, p.bias, p.sign, h_ref=packed)
        same(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_reference_equal_to_h_gives_exactly_zero(dtype):
    p, packed = packed_problem(50, 192, 20, dtype, 64)
    penalty = lockin_fast.block_penalty(p.h_ref, p.weight, p.bias, p.sign, h_ref=packed)
    assert penalty.total == 0.0 and penalty.active == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("outliers", [0, 1])
def test_nan_and_inf_of_the_reference_reach_the_loss_unless_masked(bad, dtype, outliers, poisoned_memory):
    p = problem(20, 48, 13, dtype)
    p.sign.copy_(torch.tensor([1.0, -1.0]).repeat(7)[:13])
    p.h_ref[3, 5] = bad
    channels = torch.tensor([5])[:outliers]
    packed = lockin_fast.quantize_nf4(p.h_ref, blocksize=16, outliers=channels)
    per_token = op(*arguments(p, packed))[0]
    assert not per_token[3].isfinite() and per_token.isfinite().sum() == 19
    mask = torch.arange(20) != 3
    assert lockin_fast.block_penalty(p.h, p.weight, p.bias, p.sign, h_ref=packed, mask=mask).total.isfinite()


@pytest.mark.parametrize(("tokens", "latents"), [(0, 5), (4, 0), (0, 0)])
def test_no_tokens_or_no_latents(tokens, latents, poisoned_memory):
    p, packed = packed_problem(tokens, 48, latents, torch.float32)
    penalty = lockin_fast.block_penalty(p.h, p.weight, p.bias, p.sign, h_ref=packed)
    assert penalty.total == 0.0 and penalty.tokens == tokens and penalty.active == 0


@pytest.mark.skipif(interpreted, reason="triton's interpreter is not for this")
def test_independent_of_threads_and_of_company():
    made = [packed_problem(300, 192, 20, torch.bfloat16, 64, masked=True, seed=seed) for seed in range(2)]
    expected = [op(*arguments(*one)) for one in made]
    with ThreadPoolExecutor(2) as pool:
        for i, got in enumerate(pool.map(lambda i: op(*arguments(*made[i % 2])), range(40))):
            same(got, expected[i % 2])
    for threads in (1, 3):
        with on_threads(threads):
            same(op(*arguments(*made[0])), expected[0])


def test_opcheck_and_shapes_without_values():
    p, packed = packed_problem(9, 48, 5, torch.float32, masked=True, threshold=True, margin=True)
    torch.library.opcheck(op, arguments(p, packed), test_utils=CHECKS)
    p, packed = packed_problem(9, 48, 5, torch.float16, outliers=0)
    torch.library.opcheck(op, arguments(p, packed), test_utils=CHECKS)
    with FakeTensorMode():
        h = torch.empty(9, 48, dtype=torch.bfloat16, requires_grad=True)
        h_ref = lockin_fast.quantize_nf4(h, blocksize=16, outliers=1)
        tapped, penalty = lockin_fast.block_penalty_tap(
            h * 1.0, torch.empty(5, 48), torch.empty(5), torch.empty(5), h_ref=h_ref
        )
        (tapped.sum() + penalty.total).backward()
        assert h.grad.shape == (9, 48)


def test_in_one_graph():
    def step(h, h_ref, p):
        tapped, penalty = lockin_fast.block_penalty_tap(h * 1.0, p.weight, p.bias, p.sign, h_ref=h_ref)
        other = lockin_fast.block_penalty(tapped.tanh(), p.weight, p.bias, p.sign, h_ref=h_ref)
        return tapped.square().sum() + penalty.total + other.total

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    p, packed = packed_problem(9, 48, 5, torch.float32)
    results = []
    for function in (step, compiled):
        h = p.h.clone().requires_grad_()
        loss = function(h, packed, p)
        loss.backward()
        results.append((loss.detach(), h.grad))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(eager, traced)


def test_errors_name_the_argument():
    p, packed = packed_problem(6, 48, 4, torch.float32)
    rest = p.weight, p.bias, p.sign
    with pytest.raises(ValueError, match=re.escape("h_ref: got NF4Tensor((6, 48)") + ".*" + re.escape("(5, 48) of h")):
        lockin_fast.block_penalty(p.h[:5], *rest, h_ref=packed)
    with pytest.raises(ValueError, match="h_ref: is on meta, but h is on cpu"):
        lockin_fast.block_penalty(p.h, *rest, h_ref=packed.to("meta"))
    with pytest.raises(ValueError, match="z_ref, h_ref: got both"):
        lockin_fast.block_penalty(p.h, *rest, h_ref=packed, z_ref=torch.zeros(6, 4))


def test_the_gradient_is_the_dense_one_for_any_upstream():
    p, packed = packed_problem(20, 48, 13, torch.float32)
    upstream = torch.randn(20, generator=torch.Generator().manual_seed(1))
    grads = []
    for rest in (arguments(p, packed), p.op_arguments):
        h = p.h.clone().requires_grad_()
        dense_module.PerTokenPenalty.apply(h, *rest[1:])[0].backward(upstream)
        grads.append((h.grad,))
    same(*grads)
