"""One frozen linear layer under N LoRA adapters: the base product once for all rows, the low-rank part batched."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lockin_fast.ops.nf4_tensor import NF4Tensor


@dataclass
class Window:
    """Which adapters of the stack the rows of a forward belong to: first to last, in equal shares; none when off."""

    first: int
    last: int
    on: bool = True


class Factors:
    """The adapters of one linear layer: views of the stack's parameters and gradients, which have a row an adapter.

    down: A of the adapters [N, r, in]; up: B transposed [N, r, out], since products with long contiguous rows are the
    fast ones. Their gradients are added to by the backward, in place.
    """

    def __init__(self, weights: Tensor, grads: Tensor, rank: int, width: int):
        self.down, self.up = _split(weights, rank, width)
        self.down_grad, self.up_grad = _split(grads, rank, width)
        self.down.requires_grad_(True)  # so that autograd comes by; the backward writes the gradients itself


def _split(flat: Tensor, rank: int, width: int) -> tuple[Tensor, Tensor]:
    down, up = flat[:, : rank * width], flat[:, rank * width :]
    return down.unflatten(1, (rank, -1)), up.unflatten(1, (rank, -1))


class StackedLinear(nn.Module):
    """y = x W^T + bias + scale * (x A_n^T) B_n^T for rows x [N * b, ..., in], the b rows of adapter n together.

    W stays as the base layer holds it; 4-bit weights are decoded once for all rows, in the forward and in the backward.
    Nothing of the size of W is kept between the two. With the window off, or through `disable_adapters` as PEFT's
    layers have it, y = x W^T + bias for any number of rows.

    Cost: that of the base layer, plus 2 r (in + out) multiplications a row forward and twice that backward; keeps x
    (shared with other layers that read it) and [rows, r].
    """

    def __init__(self, base: nn.Module, factors: Factors, scale: float, window: Window):
        super().__init__()
        self.base_layer = base
        self._matrix = base_matrix(base)
        self._factors, self._scale, self._window = factors, scale, window
        self._disable_adapters = False

    @property
    def disable_adapters(self) -> bool:
        return self._disable_adapters

    def forward(self, x: Tensor) -> Tensor:
        window = self._window
        compute, low = self._dtypes(x)
        bias = self.base_layer.bias
        if self._disable_adapters or not window.on:
            with torch.autocast(x.device.type, enabled=False):
                weight = self._matrix(compute)
                return F.linear(x.to(compute), weight, None if bias is None else bias.to(compute)).to(self._out(x))
        product = Product(self._matrix, bias, self._factors, self._scale, window.first, window.last, compute, low)
        return _Stacked.apply(x, self._factors.down, product, self._out(x))

    def _dtypes(self, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
        """In what the base product and the low-rank part are computed: as PEFT's layers do, also under autocast."""
        lowered = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
        low = lowered or self._factors.down.dtype
        if hasattr(self.base_layer, "compute_dtype"):  # 4-bit layers do not heed autocast
            return self.base_layer.compute_dtype or x.dtype, low
        return lowered or self.base_layer.weight.dtype, low

    def _out(self, x: Tensor) -> torch.dtype:
        if hasattr(self.base_layer, "compute_dtype"):
            return x.dtype
        return self._dtypes(x)[0]


@dataclass(frozen=True)
class Product:
    """What `_Stacked` multiplies with; `matrix(dtype)` is the base weight [out, in]."""

    matrix: object
    bias: Tensor | None
    factors: Factors
    scale: float
    first: int
    last: int
    compute: torch.dtype
    low: torch.dtype

    def of_window(self, factor: Tensor) -> Tensor:
        return factor[self.first : self.last].to(self.low)


class _Stacked(torch.autograd.Function):
    """The product, and its gradients to x and, added in place, to the factors. `leaf` only says that there is one."""

    @staticmethod
    def forward(ctx, x, leaf, product, out_dtype):
        p, count = product, product.last - product.first
        with torch.autocast(x.device.type, enabled=False):
            bias = None if p.bias is None else p.bias.to(p.compute)
            y = F.linear(x.to(p.compute), p.matrix(p.compute), bias).to(out_dtype)
            rows = x.reshape(count, -1, x.shape[-1]).to(p.low)
            inner = torch.bmm(rows, p.of_window(p.factors.down).mT)  # [N, t, r]
            _add_product(y.view(count, -1, y.shape[-1]), inner, p.of_window(p.factors.up), p.scale)
        ctx.save_for_backward(x, inner)
        ctx.product = product
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, inner = ctx.saved_tensors
        p, count = ctx.product, ctx.product.last - ctx.product.first
        with torch.autocast(x.device.type, enabled=False):
            grads = grad.reshape(count, -1, grad.shape[-1])
            low_grads = grads.to(p.low)
            inner_grad = torch.bmm(low_grads, p.of_window(p.factors.up).mT).mul_(p.scale)
            _add_product(p.factors.up_grad[p.first : p.last], inner.mT, low_grads, p.scale)
            rows = x.reshape(count, -1, x.shape[-1]).to(p.low)
            _add_product(p.factors.down_grad[p.first : p.last], inner_grad.mT, rows, 1.0)
            if not ctx.needs_input_grad[0]:
                return None, None, None, None
            x_grad = torch.mm(grad.reshape(-1, grad.shape[-1]).to(p.compute), p.matrix(p.compute)).to(x.dtype)
            _add_product(x_grad.view(count, -1, x.shape[-1]), inner_grad, p.of_window(p.factors.down), 1.0)
        return x_grad.view(x.shape), None, None, None


def _add_product(out: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """out += scale * left @ right, batched, whatever the dtype of out."""
    if out.dtype == left.dtype and out.is_contiguous():
        out.baddbmm_(left, right, alpha=scale)
    else:  # in place, a CPU would multiply one adapter at a time
        out.add_(torch.bmm(left, right), alpha=scale)


def check_base(name: str, base: nn.Module) -> None:
    """Raise ValueError unless a stack can stand on this layer: a plain linear one, or bitsandbytes' in 4 bits."""
    if type(base) is nn.Linear or _four_bit(base):
        return
    reason = "LLM.int8() treats a column by all rows of a batch, so adapters would not be independent of each other; "
    raise ValueError(
        f"model: {name} is a {type(base).__name__}; a stack of adapters trains on nn.Linear and on 4-bit layers of "
        f"bitsandbytes. {reason if hasattr(base.weight, 'CB') else ''}train one adapter at a time (sweep.stack: 1)"
    )


def _four_bit(base: nn.Module) -> bool:
    return getattr(base.weight, "quant_state", None) is not None


def base_matrix(base: nn.Module):
    """A function dtype -> the base weight [out, in] in that dtype; decoded at every call where it is held in 4 bits."""
    if not _four_bit(base):
        weight = base.weight
        return lambda dtype: weight.detach().to(dtype)
    state = base.weight.quant_state
    if state.quant_type == "nf4" and state.shape[-1] % state.blocksize == 0:
        return NF4Tensor.from_bnb(base.weight.data, state).dequantize
    from bitsandbytes.functional import dequantize_4bit

    return lambda dtype: dequantize_4bit(base.weight.data, state).to(dtype)
