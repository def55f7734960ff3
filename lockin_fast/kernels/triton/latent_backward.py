"""The gradient to the hidden state, (scale * coefficient) W, added to one already there; quiet tiles do no product."""

import torch
import triton
import triton.language as tl

from lockin_fast.kernels.triton._tiles import INTERPRETING, check_dtype, with_rows

LAUNCH = {"num_warps": 4, "num_stages": 2}


@triton.jit
def backward_kernel(
    coefficient, scale, scale_stride, weight, grad, grad_stride, out, out_stride, T, K, D, IN_PLACE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = tokens < T
    tile = inside[:, None] & (d < D)[None, :]
    upstream = tl.load(scale + tokens * scale_stride, mask=inside, other=0.0)[:, None]
    acc = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    touched = 0
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        c = tl.load(coefficient + tokens[:, None] * K + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
        c = tl.where(c == 0.0, 0.0, c * upstream)  # a zero coefficient adds nothing, whatever the scale
        some = tl.sum((c != 0.0).to(tl.int32))
        if some > 0:
            place = weight + k.to(tl.int64)[:, None] * D + d[None, :]
            w = tl.load(place, mask=(k < K)[:, None] & (d < D)[None, :], other=0.0)
            acc = tl.dot(c, w.to(tl.float32), acc, input_precision=PRECISION)
        touched += some
    if IN_PLACE:
        if touched > 0:
            before = tl.load(grad + tokens[:, None] * grad_stride + d[None, :], mask=tile, other=0.0).to(tl.float32)
            tl.store(grad + tokens[:, None] * grad_stride + d[None, :], before + acc, mask=tile)
    else:
        if grad is not None:
            acc += tl.load(grad + tokens[:, None] * grad_stride + d[None, :], mask=tile, other=0.0).to(tl.float32)
        tl.store(out + tokens[:, None] * out_stride + d[None, :], acc, mask=tile)


def sizes(tokens, latents, dtype):
    """Constants of the launch. fp32 products stay fp32. A 16-bit weight is exact in tf32, whose three-term product
    keeps the fp32 coefficients and runs on tensor cores.
    """
    return {
        "BLOCK_T": 32,
        "BLOCK_K": min(max(triton.next_power_of_2(latents), 16), 32),
        "BLOCK_D": 128,
        "PRECISION": "ieee" if dtype == torch.float32 or INTERPRETING else "tf32x3",
    }


def _launch(coefficient, scale, weight, grad, out, in_place):
    check_dtype(weight.dtype)
    coefficient, weight, grad = coefficient.contiguous(), weight.contiguous(), with_rows(grad)
    T, K = coefficient.shape
    D = weight.shape[1]
    constants = sizes(T, K, weight.dtype)
    grid = triton.cdiv(T, constants["BLOCK_T"]), triton.cdiv(D, constants["BLOCK_D"])
    if T and D:
        backward_kernel[grid](
            coefficient, scale, scale.stride(0), weight, grad, 0 if grad is None else grad.stride(0), out,
            out.stride(0), T, K, D, in_place, **constants, **LAUNCH,
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
