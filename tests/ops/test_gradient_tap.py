"""The split tap: the gradients of the plain penalty, whatever the order, scaling and repetition of backward calls."""

import pytest
import torch
from penalty_oracle import problem
from test_block_penalty_tap import EVERY, SHARED, UNSHARED, D, K, T, run, weights
from torch.utils.checkpoint import checkpoint

import lockin_fast
from lockin_fast.ops import gradient_tap as module
from lockin_fast.ops.gradient_tap import gradient_tap


def split(x, *rows, **options):
    h = gradient_tap(x)
    return h, lockin_fast.block_penalty(h, *rows, **options)


def plain(x, *rows, **options):
    return x, lockin_fast.block_penalty(x, *rows, **options)


def measured(consume, monkeypatch, in_place, retain=False):
    return run(consume, monkeypatch, in_place, retain, tapped=split, module=module)


@pytest.mark.parametrize("retain", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("name", EVERY)
def test_nobody_sees_the_gradient_change(name, retain, monkeypatch):
    grad, kept, _ = measured(EVERY[name], monkeypatch, True, retain)
    expected, expected_kept, never = measured(EVERY[name], monkeypatch, False, retain)
    assert never == 0 and torch.equal(grad, expected)
    for value, before in zip(kept, expected_kept, strict=True):
        assert torch.equal(value, before)
    joined, *_ = run(EVERY[name], monkeypatch, False, retain)
    assert torch.equal(grad, joined)


@pytest.mark.parametrize("name", UNSHARED)
def test_an_unshared_gradient_is_written_over(name, monkeypatch):
    assert measured(UNSHARED[name], monkeypatch, True)[2] == 1


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_gradient_is_not(name, monkeypatch):
    retain = name == "saved tensor"  # in its last backward a node no longer holds what it saved
    assert measured(SHARED[name], monkeypatch, True, retain)[2] <= int(retain)


def backward_whole(sft, penalty):
    (sft + 3.0 * penalty).backward()


def backward_scaled(sft, penalty):
    ((sft + 3.0 * penalty) * 1024.0).backward()


def backward_apart(sft, penalty):
    sft.backward(retain_graph=True)
    (3.0 * penalty).backward()


def backward_penalty_first(sft, penalty):
    (3.0 * penalty).backward(retain_graph=True)
    sft.backward()


def backward_again(sft, penalty):
    loss = sft + 3.0 * penalty
    for _ in range(3):
        loss.backward(retain_graph=True)


def backward_after_one_that_stays_above(sft, penalty):
    loss = sft + 3.0 * penalty
    torch.autograd.grad(loss, [penalty], retain_graph=True)
    loss.backward()


def backward_penalty_alone(sft, penalty):
    penalty.backward()


ORDERS = [value for name, value in list(globals().items()) if name.startswith("backward_")]


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_order_of_backward_calls_gives_the_plain_gradient(order, dtype):
    p = problem(T, D, K, dtype, masked=True)
    truth = problem(T, D, K, dtype, masked=True).at(torch.float64)

    def gradient(p, tapped):
        x = p.h.clone().requires_grad_()
        h, penalty = tapped(x * 1.0, p.weight, p.bias, p.sign, **p.options)
        order((h * weights().to(h.dtype)).sum(), penalty.total)
        return x.grad.double()

    exact = gradient(truth, reference_penalty)
    allowed = 2 * (gradient(p, plain) - exact).abs().max() + 8 * torch.finfo(dtype).eps * exact.abs().max()
    assert (gradient(p, split) - exact).abs().max() <= allowed


def reference_penalty(h, weight, bias, sign, *, h_ref, mask, z_ref, threshold, margin, latent_reduction):
    """The formula in autograd's hands."""
    assert z_ref is None and threshold is None and margin is None and latent_reduction == "sum"
    z, z_ref = (h @ weight.T + bias).relu(), (h_ref @ weight.T + bias).relu()
    per_token = (sign * (z - z_ref)).relu().square().sum(1)
    return h, lockin_fast.ops.block_penalty.Penalty(per_token[mask].sum(), mask.sum(), None)


def test_several_penalties_share_a_tap():
    problems = [problem(T, D, K, torch.float32, seed=seed) for seed in (0, 1, 2)]
    grads = []
    for tap in (False, True):
        x = problems[0].h.clone().requires_grad_()
        h = gradient_tap(x * 1.0) if tap else x * 1.0
        loss = (h * weights()).sum()
        for scale, p in enumerate(problems, 1):
            loss = loss + scale * lockin_fast.block_penalty(h, p.weight, p.bias, p.sign, h_ref=p.h_ref).total
        loss.backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True], ids=["tap outside", "tap inside"])
def test_recomputation(reentrant, inside):
    p = problem(T, D, K, torch.float32)
    grads = []
    for tapped in (plain, split):
        weight = torch.eye(D, requires_grad=True)

        def below(x, weight=weight, tap=tapped is split and inside):
            h = torch.tanh(x @ weight) * 2.0
            return gradient_tap(h) if tap else h

        h = checkpoint(below, p.h.clone().requires_grad_(), use_reentrant=reentrant)
        if tapped is split and not inside:
            h = gradient_tap(h)
        penalty = lockin_fast.block_penalty(h, p.weight, p.bias, p.sign, h_ref=p.h_ref)
        above = checkpoint(lambda h: (torch.tanh(h) * weights()).sum(), h, use_reentrant=reentrant)
        (above + 3.0 * penalty.total).backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads)


def test_a_backward_that_stops_above_the_tap_leaves_nothing_for_the_next():
    p = problem(T, D, K, torch.float32)
    x = p.h.clone().requires_grad_()
    h = gradient_tap(x * 1.0)
    above = torch.ones(D, requires_grad=True)
    sft = (h * above).square().sum()
    loss = sft + lockin_fast.block_penalty(h, p.weight, p.bias, p.sign, h_ref=p.h_ref).total
    torch.autograd.grad(loss, [h], retain_graph=True)  # the penalty runs, the tap does not
    assert len(h.grad_fn.due) == 1
    (grad,) = torch.autograd.grad(sft, [x])
    assert torch.equal(grad, 2.0 * x.detach())


def test_without_a_gradient_it_is_h_itself():
    h = torch.randn(T, D)
    assert gradient_tap(h) is h
    with torch.no_grad():
        assert gradient_tap(h.requires_grad_()) is h


def test_double_backward_raises():
    p = problem(T, D, K, torch.float32)
    x = p.h.clone().requires_grad_()
    h, penalty = split(x, p.weight, p.bias, p.sign, h_ref=p.h_ref)
    (grad,) = torch.autograd.grad(h.square().sum() + penalty.total, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
