"""The stacked linear layer against one product an adapter, in fp64 and on every kind of base."""

import pytest
import torch
from torch import nn

from lockin_fast.stacked.linear import Factors, StackedLinear, Window, base_matrix, check_base

ADAPTERS, RANK, IN, OUT = 3, 2, 5, 7


def layer(dtype=torch.float64, *, bias=True, window=None, base=None):
    """A stacked layer with random factors, and the block of gradients that it adds to."""
    generator = torch.Generator().manual_seed(0)
    base = base or nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    base.requires_grad_(False)
    size = RANK * (base.in_features + base.out_features)
    weights = torch.randn(ADAPTERS, size + 4, dtype=torch.float64, generator=generator).to(dtype)
    grads = torch.zeros_like(weights)
    factors = Factors(weights[:, 2:-2], grads[:, 2:-2], RANK, base.in_features)  # a part of a longer row, as in a stack
    return StackedLinear(base, factors, 1.5, window or Window(0, ADAPTERS)), weights, grads


def expected(stacked, weights, x, adapters):
    """One product after the other, from PEFT's formula."""
    rows, base = x.chunk(len(adapters)), stacked.base_layer
    outputs = []
    for row, n in zip(rows, adapters, strict=True):
        down = weights[n, 2 : 2 + RANK * IN].view(RANK, IN)
        up = weights[n, 2 + RANK * IN : -2].view(RANK, OUT).T
        outputs.append(base(row) + 1.5 * row @ down.T @ up.T)
    return torch.cat(outputs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("first_last", [(0, 3), (1, 2), (1, 3)])
def test_values_and_gradients_are_those_of_single_adapters(bias, first_last):
    stacked, weights, grads = layer(bias=bias, window=Window(*first_last))
    adapters = range(*first_last)
    x = torch.randn(2 * len(adapters), 4, IN, dtype=torch.float64, requires_grad=True)
    theirs = weights.clone().requires_grad_(True)
    upstream = torch.randn(2 * len(adapters), 4, OUT, dtype=torch.float64)
    want = expected(stacked, theirs, x, adapters)
    want_x, want_weights = torch.autograd.grad(want, (x, theirs), upstream)
    for count in (1, 2):  # gradients of the factors add up, as over micro-batches
        got = stacked(x)
        (got_x,) = torch.autograd.grad(got, x, upstream)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(got_x, want_x)
        torch.testing.assert_close(grads, count * want_weights)


def test_an_input_without_gradient_still_trains_the_factors():
    stacked, weights, grads = layer()
    x = torch.randn(ADAPTERS, 4, IN, dtype=torch.float64)
    stacked(x).sum().backward()
    theirs = weights.clone().requires_grad_(True)
    (want,) = torch.autograd.grad(expected(stacked, theirs, x, range(ADAPTERS)).sum(), theirs)
    torch.testing.assert_close(grads, want)


def test_it_is_right_for_rows_that_are_not_contiguous():
    stacked, weights, _ = layer()
    x = torch.randn(IN, 6, 4, dtype=torch.float64).permute(1, 2, 0)
    torch.testing.assert_close(stacked(x), expected(stacked, weights, x, range(ADAPTERS)))


@pytest.mark.parametrize("how", ["window", "adapters"])
def test_switched_off_it_is_the_base_for_any_number_of_rows(how):
    window = Window(0, ADAPTERS, on=how != "window")
    stacked, _, _ = layer(window=window)
    stacked._disable_adapters = how == "adapters"
    x = torch.randn(5, 4, IN, dtype=torch.float64)
    assert torch.equal(stacked(x), stacked.base_layer(x))


def test_a_bad_row_stays_with_its_adapter():
    stacked, weights, grads = layer(torch.float32)
    x = torch.randn(ADAPTERS, 4, IN, requires_grad=True)
    clean = stacked(x)
    clean.square().sum().backward()
    clean_grads, clean_x = grads.clone(), x.grad.clone()
    grads.zero_()
    with torch.no_grad():
        weights[1] = torch.nan
    x.grad = None
    broken = stacked(x)
    broken.square().sum().backward()
    assert broken[1].isnan().all() and grads[1].isnan().any()
    for n in (0, 2):
        assert torch.equal(broken[n], clean[n]) and torch.equal(grads[n], clean_grads[n])
        assert torch.equal(x.grad[n], clean_x[n])


def test_autocast_computes_in_bf16_and_comes_back_in_it():
    stacked, weights, grads = layer(torch.float32)
    x = torch.randn(ADAPTERS, 4, IN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = stacked(x)
        want = expected(stacked, weights, x, range(ADAPTERS))
    assert out.dtype == want.dtype == torch.bfloat16
    exact = expected(stacked, weights, x, range(ADAPTERS))
    assert (out - exact).abs().max() <= 2 * (want - exact).abs().max()
    out.sum().backward()
    assert x.grad.dtype == grads.dtype == torch.float32 and grads.abs().sum() > 0


def four_bit(width, out=128, *, kind="nf4", nested=True, compute=None):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    made = bitsandbytes.nn.Linear4bit(
        width, out, bias=False, compute_dtype=compute, quant_type=kind, compress_statistics=nested
    ).to("cpu")
    made.support_avx512bf16_for_cpu = False
    return made


@pytest.mark.parametrize(("width", "kind", "nested"), [(64, "nf4", True), (64, "nf4", False), (48, "nf4", True),
                                                       (64, "fp4", True)])  # fmt: skip
def test_4_bit_weights_are_decoded_to_bitsandbytes_own_values(width, kind, nested):
    base = four_bit(width, kind=kind, nested=nested)
    from bitsandbytes.functional import dequantize_4bit

    want = dequantize_4bit(base.weight.data, base.weight.quant_state)
    assert want.shape == (128, width) and torch.equal(base_matrix(base)(torch.float32), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_4_bit_base_multiplies_as_its_own_layer(dtype):
    base = four_bit(64, compute=dtype)
    stacked, _, _ = layer(torch.float32, base=base)
    stacked._disable_adapters = True
    x = torch.randn(6, 4, 64).to(dtype)
    got, want = stacked(x), base(x)
    exact = x.double() @ base_matrix(base)(torch.float32).double().T
    assert got.dtype == want.dtype == dtype
    assert (got - exact).abs().max() <= 2 * (want - exact).abs().max() + torch.finfo(dtype).eps


def test_other_layers_are_refused_by_name():
    class Strange(nn.Linear):
        pass

    with pytest.raises(ValueError, match=r"layers.0.q_proj is a Strange; .*sweep.stack: 1"):
        check_base("layers.0.q_proj", Strange(2, 2))
    pytest.importorskip("bitsandbytes")
    import bitsandbytes

    with pytest.raises(ValueError, match="treats a column by all rows"):
        check_base("q_proj", bitsandbytes.nn.Linear8bitLt(16, 16, has_fp16_weights=False))
