"""The tap writes over the gradient that arrives only where nobody else can see it."""

import pytest
import torch
from penalty_oracle import problem
from torch.utils.checkpoint import checkpoint

import lockin_fast
from lockin_fast.ops import _unshared
from lockin_fast.ops import block_penalty_tap as tap_module

T, D, K = 12, 48, 5


def weights(seed=3):
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed))


class Returns(torch.autograd.Function):
    """a + b, whose backward returns whatever `maker` makes of the upstream gradient."""

    @staticmethod
    def forward(ctx, a, b, maker):
        ctx.maker = maker
        return a + b

    @staticmethod
    def backward(ctx, grad):
        return *ctx.maker(grad), None


class ReturnsSaved(torch.autograd.Function):
    """A node that hands out its own saved tensor as the gradient, as fused losses do."""

    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h * 3.0)
        return h.sum()

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0]


def twice(grad):
    one = grad * weights()
    return one, one


def leaf(kept):
    kept.append(torch.zeros(T, D, requires_grad=True))
    return kept[-1]


def held(kept, value):
    kept.append(value)
    return value


# Each takes the tapped h and a list for everything that outlives the backward, and returns a loss.
UNSHARED = {
    "product": lambda h, kept: (h * weights()).sum(),
    "matmul": lambda h, kept: (h @ torch.ones(D, 3)).square().sum(),
    "two consumers": lambda h, kept: (h * weights()).sum() + h.square().sum(),
    "residual": lambda h, kept: ((h + torch.tanh(h @ torch.eye(D))) * weights()).sum(),
    "norm": lambda h, kept: (torch.nn.functional.rms_norm(h, (D,)) * weights()).sum(),
    "checkpointed layer": lambda h, kept: (h + checkpoint(torch.tanh, h, use_reentrant=False)).square().sum(),
    "a hook that only looks": lambda h, kept: h.register_hook(lambda g: None) and (h * weights()).sum(),
}
SHARED = {
    "expanded": lambda h, kept: h.sum(),
    "view": lambda h, kept: (h.view(-1) * weights().view(-1)).sum(),
    "transpose": lambda h, kept: (h.t() * weights().t()).sum(),
    "part of a concatenation": lambda h, kept: (torch.cat([h, leaf(kept)]) * weights().repeat(2, 1)).sum(),
    "a hook that keeps": lambda h, kept: h.register_hook(lambda g: kept.append(g)) and (h * weights()).sum(),
    "a hook that keeps a view": lambda h, kept: h.register_hook(lambda g: kept.append(g[1:])) and (h * weights()).sum(),
    "a hook that keeps detached": (
        lambda h, kept: h.register_hook(lambda g: kept.append(g.detach())) and (h * weights()).sum()
    ),
    "a hook that keeps numpy": (
        lambda h, kept: h.register_hook(lambda g: kept.append(torch.from_numpy(g.numpy()))) and (h * weights()).sum()
    ),
    "a hook that keeps the storage": (
        lambda h, kept: h.register_hook(lambda g: kept.append(g.untyped_storage())) and (h * weights()).sum()
    ),
    "a hook that returns what it keeps": (
        lambda h, kept: h.register_hook(lambda g: held(kept, g * 2.0)) and (h * weights()).sum()
    ),
    "a prehook that keeps": (
        lambda h, kept: h.grad_fn.register_prehook(lambda g: kept.extend(g[:1])) and (h * weights()).sum()
    ),
    "saved tensor": lambda h, kept: ReturnsSaved.apply(h),
    "returned held": lambda h, kept: Returns.apply(h, h.detach(), lambda g: (held(kept, weights()), None)).sum(),
    "returned view of held": (
        lambda h, kept: Returns.apply(h, h.detach(), lambda g: (held(kept, weights()).view(T, D), None)).sum()
    ),
    "returned memory of numpy": (
        lambda h, kept: Returns.apply(
            h, h.detach(), lambda g: (torch.from_numpy(held(kept, weights().numpy())), None)
        ).sum()
    ),
}
# Whether these are shared by the time the tap runs is the engine's business; the values are what counts.
EITHER = {
    "retain_grad": lambda h, kept: h.retain_grad() or (kept.append(h), (h * weights()).sum())[1],
    "sum with a leaf": lambda h, kept: ((h + leaf(kept)) * weights()).sum(),
    "returned twice, to a leaf": lambda h, kept: Returns.apply(h, leaf(kept), twice).sum(),
    "returned twice, to h": lambda h, kept: Returns.apply(h, h, twice).sum(),
    "leaf stays on the tape": lambda h, kept: ((h + leaf(kept) * 1.0) * weights()).sum() + (kept[-1] * h).sum(),
}
EVERY = UNSHARED | SHARED | EITHER


def whole(x, *rows, **options):
    return lockin_fast.block_penalty_tap(x, *rows, **options)


def run(consume, monkeypatch, in_place, retain=False, *, tapped=whole, module=tap_module):
    """Gradient of x, everything kept, and how often the tap wrote in place."""
    p = problem(T, D, K, torch.float32)
    x = p.h.clone().requires_grad_()
    kept, written = [], []
    write = module.latent_backward_
    with monkeypatch.context() as patch:
        patch.setattr(module, "latent_backward_", lambda *args: written.append(1) or write(*args))
        if not in_place:
            patch.setattr(module, "holders_are_seen", lambda: False)
        h, penalty = tapped(x * 1.0, p.weight, p.bias, p.sign, h_ref=p.h_ref)
        loss = consume(h, kept) + 3.0 * penalty.total
        if retain:
            loss.backward(retain_graph=True)
        loss.backward()
    return x.grad, [as_tensor(value) for value in kept], len(written)


def as_tensor(value):
    if isinstance(value, torch.UntypedStorage):
        return torch.tensor(list(value))
    value = torch.as_tensor(value)
    return value.grad if value.requires_grad else value


@pytest.mark.parametrize("retain", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("name", EVERY)
def test_nobody_sees_the_gradient_change(name, retain, monkeypatch):
    grad, kept, _ = run(EVERY[name], monkeypatch, True, retain)
    expected, expected_kept, never = run(EVERY[name], monkeypatch, False, retain)
    assert never == 0
    assert torch.equal(grad, expected)
    assert len(kept) == len(expected_kept)
    for value, before in zip(kept, expected_kept, strict=True):
        assert torch.equal(value, before)


@pytest.mark.parametrize("name", UNSHARED)
def test_an_unshared_gradient_is_written_over(name, monkeypatch):
    assert run(UNSHARED[name], monkeypatch, True)[2] == 1


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_gradient_is_not(name, monkeypatch):
    retain = name == "saved tensor"  # in its last backward a node no longer holds what it saved
    assert run(SHARED[name], monkeypatch, True, retain)[2] <= int(retain)


def test_gradients_that_the_caller_holds():
    p = problem(T, D, K, torch.float32)
    for capture in (False, True):
        x = p.h.clone().requires_grad_()
        mine = weights()
        before = mine.clone()
        h, penalty = lockin_fast.block_penalty_tap(x * 1.0, p.weight, p.bias, p.sign, h_ref=p.h_ref)
        inputs = [h, x] if capture else [x]
        grads = torch.autograd.grad([h, penalty.total], inputs, grad_outputs=[mine, torch.tensor(3.0)])
        assert torch.equal(mine, before)
        if capture:
            assert torch.equal(grads[0], before)


def test_the_gradient_is_that_of_the_plain_penalty():
    p = problem(T, D, K, torch.float32, masked=True)
    grads = []
    for tap in (False, True):
        x = p.h.clone().view(3, 4, D).requires_grad_()
        options = p.options | {"h_ref": p.h_ref.view(3, 4, D), "mask": p.mask.view(3, 4)}
        if tap:
            h, penalty = lockin_fast.block_penalty_tap(x * 1.0, p.weight, p.bias, p.sign, **options)
        else:
            h = x * 1.0
            penalty = lockin_fast.block_penalty(h, p.weight, p.bias, p.sign, **options)
        ((h.view(T, D) * weights()).sum() + 0.5 * penalty.total).backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("use", ["h alone", "penalty alone"])
def test_one_output_unused(use):
    p = problem(T, D, K, torch.float32)
    x = p.h.clone().requires_grad_()
    h, penalty = lockin_fast.block_penalty_tap(x * 1.0, p.weight, p.bias, p.sign, h_ref=p.h_ref)
    assert torch.equal(h, x)
    (h.square().sum() if use == "h alone" else penalty.total).backward()
    if use == "h alone":
        assert torch.equal(x.grad, 2.0 * x)
    else:
        y = p.h.clone().requires_grad_()
        lockin_fast.block_penalty(y, p.weight, p.bias, p.sign, h_ref=p.h_ref).total.backward()
        assert torch.equal(x.grad, y.grad)


def test_without_grad_h_comes_back_itself():
    p = problem(T, D, K, torch.float32)
    h, penalty = lockin_fast.block_penalty_tap(p.h, p.weight, p.bias, p.sign, h_ref=p.h_ref)
    assert h is p.h and not penalty.total.requires_grad


def test_double_backward_raises():
    p = problem(T, D, K, torch.float32)
    x = p.h.clone().requires_grad_()
    h, penalty = lockin_fast.block_penalty_tap(x, p.weight, p.bias, p.sign, h_ref=p.h_ref)
    (grad,) = torch.autograd.grad(h.square().sum() + penalty.total, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_probe_tells_held_from_free_and_gives_up_when_it_cannot(monkeypatch):
    held_verdicts, free = _unshared._verdicts()
    assert not any(held_verdicts) and free is True
    monkeypatch.setattr(_unshared, "_seen", None)
    monkeypatch.setattr(_unshared, "_verdicts", lambda: ([False, True], True))
    assert _unshared.holders_are_seen() is False and _unshared._seen is False


def test_a_torch_that_does_not_count_holders_loses_only_the_writing_over(monkeypatch):
    consume = next(iter(UNSHARED.values()))
    expected = run(consume, monkeypatch, True)
    monkeypatch.setattr(_unshared, "_seen", None)
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    grad, _, written = run(consume, monkeypatch, True)
    assert expected[2] == 1 and written == 0
    torch.testing.assert_close(grad, expected[0])
