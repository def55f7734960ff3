"""The gradient to the hidden state, (scale * coefficient) W, added to one already there; quiet tokens cost nothing."""

import torch
import triton
import triton.language as tl

from lockin_fast.kernels.triton import _configs
from lockin_fast.kernels.triton._tiles import check_dtype, with_rows


@triton.jit
def backward_kernel(
    coefficient, scale, weight, grad, grad_stride, out, out_stride, T, K, D, IN_PLACE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = tokens < T
    upstream = tl.load(scale + tokens, mask=inside, other=0.0)[:, None]
    written = inside
    if IN_PLACE:  # a token on which nothing is active is neither read nor written
        some = tl.zeros((BLOCK_T,), dtype=tl.int32)
        for k0 in range(0, K, BLOCK_K):
            c = _scaled(coefficient, upstream, tokens, inside, k0, K, BLOCK_K)
            some = tl.maximum(some, tl.max((c != 0.0).to(tl.int32), axis=1))
        written = inside & (some > 0)
    tile = written[:, None] & (d < D)[None, :]
    if grad is not None:  # under way while the product is taken
        before = tl.load(grad + tokens[:, None] * grad_stride + d[None, :], mask=tile, other=0.0)
    acc = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        c = _scaled(coefficient, upstream, tokens, inside, k0, K, BLOCK_K)
        if tl.sum((c != 0.0).to(tl.int32)) > 0:
            k = k0 + tl.arange(0, BLOCK_K)
            place = weight + k.to(tl.int64)[:, None] * D + d[None, :]
            w = tl.load(place, mask=(k < K)[:, None] & (d < D)[None, :], other=0.0)
            acc = tl.dot(c, w.to(tl.float32), acc, input_precision=PRECISION)
    if grad is not None:
        acc += before.to(tl.float32)
    tl.store(out + tokens[:, None] * out_stride + d[None, :], acc, mask=tile)


@triton.jit
def _scaled(coefficient, upstream, tokens, inside, k0, K, BLOCK_K: tl.constexpr):
    """scale * coefficient of a tile; a zero coefficient adds nothing, whatever the scale."""
    k = k0 + tl.arange(0, BLOCK_K)
    c = tl.load(coefficient + tokens[:, None] * K + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
    return tl.where(c == 0.0, 0.0, c * upstream)


def _launch(coefficient, scale, weight, grad, out, in_place):
    check_dtype(weight.dtype)
    coefficient, scale, weight = coefficient.contiguous(), scale.contiguous(), weight.contiguous()
    grad = with_rows(grad)
    T, K = coefficient.shape
    D = weight.shape[1]
    constants = _configs.backward(weight, K)
    grid = triton.cdiv(T, constants["BLOCK_T"]), triton.cdiv(D, constants["BLOCK_D"])
    if T and D:
        backward_kernel[grid](
            coefficient, scale, weight, grad, 0 if grad is None else grad.stride(0), out, out.stride(0), T, K, D,
            in_place, **constants,
        )  # fmt: skip
    return out


def latent_backward(coefficient, scale, weight, grad):
    """[T, d] in weight's dtype; see `lockin_fast.ops.latent_backward`."""
    out = torch.empty((coefficient.shape[0], weight.shape[1]), dtype=weight.dtype, device=weight.device)
    return _launch(coefficient, scale, weight, grad, out, False)


def latent_backward_(grad, coefficient, scale, weight):
    """As above, over `grad`."""
    if grad.stride(1) != 1:
        raise ValueError(f"grad: got strides {grad.stride()}, expected 1 along d to be updated in place")
    _launch(coefficient, scale, weight, grad, grad, True)
