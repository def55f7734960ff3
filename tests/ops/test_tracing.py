"""The ops under torch.compile, fake tensors and torch's own checks of custom ops."""

import pytest
import torch
from penalty_oracle import problem
from torch._subclasses.fake_tensor import FakeTensorMode

import lockin_fast
import lockin_fast.ops

ops = torch.ops.lockin_fast
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(dtype):
    p = problem(9, 48, 5, dtype, masked=True, threshold=True, margin=True, mean=True)
    q = problem(9, 48, 5, dtype, ref="z")
    coefficient, scale = torch.randn(9, 5), torch.randn(9)
    for op, arguments in (
        (ops.block_penalty, p.op_arguments),
        (ops.block_penalty, q.op_arguments),
        (ops.encode_latents, (p.h, p.weight, p.bias, p.threshold)),
        (ops.encode_latents, (p.h, p.weight, p.bias, None)),
        (ops.latent_backward, (coefficient, scale, p.weight, None)),
        (ops.latent_backward, (coefficient, scale, p.weight, p.h)),
        (ops.latent_backward_, (p.h.clone(), coefficient, scale, p.weight)),
        (ops.latent_stats, (p.h, p.weight, p.bias, p.h_ref, p.threshold, p.mask)),
        (ops.latent_stats, (p.h, p.weight, p.bias, None, None, None)),
        (ops.segment_stats, (p.h, p.weight, p.bias, p.h_ref, p.threshold, torch.tensor([4, 4, 9]))),
        (ops.segment_stats, (p.h, p.weight, p.bias, None, None, torch.tensor([9]))),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=CHECKS)


def step(x, p):
    """Everything public in one graph."""
    h, penalty = lockin_fast.block_penalty_tap(x * 1.0, p.weight, p.bias, p.sign, **p.options)
    other = lockin_fast.block_penalty(lockin_fast.gradient_tap(h.tanh()), p.weight, p.bias, p.sign, h_ref=p.h_ref)
    z = lockin_fast.encode_latents(h, p.weight, p.bias, threshold=p.threshold)
    stats = lockin_fast.latent_stats(h.detach(), p.weight, p.bias, mask=p.mask)
    loss = h.square().sum() + 2.0 * penalty.total + 0.5 * other.total / other.tokens + z.sum()
    return loss, penalty.active, stats.mean


@pytest.mark.parametrize("dynamic", [False, True])
def test_whole_graph_compiles_and_agrees(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (9, 17):
        p = problem(tokens, 48, 5, torch.float32, masked=True, threshold=True, margin=True)
        results = []
        for function in (step, compiled):
            x = p.h.clone().requires_grad_()
            loss, active, mean = function(x, p)
            loss.backward()
            results.append((loss.detach(), active, mean, x.grad))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(eager, traced)


def test_nothing_waits_for_the_device():
    # A fake tensor has no values: asking one for its own, which on a GPU is a synchronisation, raises.
    with FakeTensorMode(allow_non_fake_inputs=False):
        h = torch.empty(9, 48, dtype=torch.bfloat16, requires_grad=True)
        weight, bias, sign = torch.empty(5, 48), torch.empty(5), torch.empty(5)
        mask = torch.empty(9, dtype=torch.bool)
        options = {"h_ref": torch.empty(9, 48, dtype=torch.bfloat16), "mask": mask, "threshold": bias, "margin": bias}
        tapped, penalty = lockin_fast.block_penalty_tap(h, weight, bias, sign, **options)
        (tapped.sum() + penalty.total + lockin_fast.encode_latents(h, weight, bias).sum()).backward()
        stats = lockin_fast.latent_stats(h, weight, bias, mask=mask)
        assert h.grad.shape == (9, 48) and h.grad.dtype is torch.bfloat16
        assert stats.mean.shape == (5,) and penalty.total.shape == ()


def patching(h, rows, source, index, coefficient, weight, bias, classes):
    """The ops on listed tokens in one graph, two of them in place."""
    h = h * 1.0
    diff = lockin_fast.patch_diff(h, rows, source, weight, bias)
    lockin_fast.patch_(h, rows, source)
    lockin_fast.steer_(h, weight, index, coefficient)
    stats = lockin_fast.routing_stats(h.flatten(0, 1)[:, :5], classes, num_classes=3, top_k=2)
    return h, diff.norm, diff.projection, diff.latents, stats.probability, stats.class_counts


def patching_inputs(positions):
    make = torch.Generator().manual_seed(0)
    h, source = torch.randn(3, 4, 48, generator=make), torch.randn(positions, 48, generator=make)
    rows = torch.stack((torch.arange(positions) % 3, torch.arange(positions) % 4), 1)
    index, classes = torch.tensor([1, -1, 0]), torch.randint(0, 3, (12,), generator=make)
    return (
        h,
        rows,
        source,
        index,
        torch.randn(3, generator=make),
        torch.randn(5, 48, generator=make),
        torch.zeros(5),
        classes,
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_patching_compiles_as_a_whole_and_agrees(dynamic, grad):
    torch._dynamo.reset()
    compiled = torch.compile(patching, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for positions in (4, 7):
        h, *rest = patching_inputs(positions)
        outcomes = []
        for function in (patching, compiled):
            x = h.clone().requires_grad_(grad)
            results = function(x, *rest)
            outcomes.append([result.detach() for result in results])
            if grad:
                results[0].square().sum().backward()
                outcomes[-1].append(x.grad)
        for eager, traced in zip(*outcomes, strict=True):
            torch.testing.assert_close(eager, traced)


def test_opcheck_of_patching():
    h, rows, source, index, coefficient, weight, bias, classes = patching_inputs(5)
    tokens, flat = h.flatten(0, 1), rows[:, 0] * 4 + rows[:, 1]
    packed = lockin_fast.quantize_nf4(source, blocksize=16, outliers=2)
    for op, arguments in (
        (ops.patch_, (tokens.clone(), flat, source)),
        (ops.patch_nf4_, (tokens.clone(), flat, *packed.operands(torch.float32))),
        (ops.patch_diff, (tokens, flat, source, weight, bias, bias)),
        (ops.patch_diff, (tokens, flat, source, weight, None, None)),
        (ops.steer_, (h.clone(), weight, index, coefficient)),
        (ops.routing_stats, (tokens, classes, classes > 0, 3, 2, True)),
        (ops.routing_stats, (tokens, None, None, 0, 1, False)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=CHECKS)


def test_patching_waits_for_no_device():
    with FakeTensorMode(allow_non_fake_inputs=False):
        h, rows, source = torch.empty(3, 4, 48), torch.empty(5, 2, dtype=torch.int64), torch.empty(5, 48)
        weight, index, classes = (
            torch.empty(6, 48),
            torch.empty(3, dtype=torch.int64),
            torch.empty(12, dtype=torch.int64),
        )
        assert lockin_fast.patch_(h, rows, source) is h and lockin_fast.steer_(h, weight, index, torch.empty(3)) is h
        assert lockin_fast.patch_diff(h, rows, source, weight, torch.empty(6)).latents.shape == (5, 6)
        stats = lockin_fast.routing_stats(h.flatten(0, 1), classes, num_classes=3)
        assert stats.class_counts.shape == (3, 48) and stats.class_mutual_information.shape == ()
