"""Hidden states in 4 bits: what is stored, how it is made, and what is taken over from bitsandbytes."""

from dataclasses import dataclass, replace

import torch

from lockin_fast.ops import _checks
from lockin_fast.ops.nf4 import BLOCKSIZES, dequantize, quantize


@dataclass(frozen=True, eq=False, repr=False)
class NF4Tensor:
    """Hidden states [..., d] in NF4, made by `quantize_nf4` or `from_bnb`; T is the product of the leading dimensions.

    Four bits an element, 32 more a block, and 16 or 32 for each element of an outlier channel.
    """

    codes: torch.Tensor  # [T, d / 2] uint8: two codes a byte, the even element in the high nibble
    absmax: torch.Tensor  # [T, d / blocksize] fp32: scales of blocks along the row
    channels: torch.Tensor | None  # [n] int32, ascending: channels that are not in the codes
    outliers: torch.Tensor | None  # [T, n]: their elements as they were
    shape: torch.Size  # [..., d]
    dtype: torch.dtype  # of what was quantised
    blocksize: int

    def __repr__(self):
        count = 0 if self.channels is None else self.channels.shape[0]
        return f"NF4Tensor({tuple(self.shape)}, {self.dtype}, blocksize={self.blocksize}, outliers={count})"

    @property
    def device(self):
        return self.codes.device

    @property
    def nbytes(self):
        """Bytes held: codes, scales, and what is kept of outlier channels."""
        return sum(x.nbytes for x in (self.codes, self.absmax, self.channels, self.outliers) if x is not None)

    def operands(self, dtype):
        """codes, absmax, channels, outliers in `dtype`, blocksize: what the ops take to decode into `dtype`."""
        outliers = None if self.outliers is None else self.outliers.to(dtype)
        return self.codes, self.absmax, self.channels, outliers, self.blocksize

    def dequantize(self, dtype=None):
        """[..., d] in `dtype`, or in that of what was quantised: codebook value times absmax, rounded once.

        Costs one read of `nbytes` and one write of the result.
        """
        dtype = self.dtype if dtype is None else dtype
        if dtype not in _checks.DTYPES:
            raise TypeError(f"dtype: got {dtype}, expected float32, float16 or bfloat16; cast the result instead")
        return dequantize(*self.operands(dtype), dtype).view(self.shape)

    def to(self, device):
        """The same on `device`."""
        moved = (x if x is None else x.to(device) for x in (self.codes, self.absmax, self.channels, self.outliers))
        return NF4Tensor(*moved, self.shape, self.dtype, self.blocksize)

    def rows(self, index):
        """The flattened tokens that `index` (int64, a slice or a bool mask) picks, as an NF4Tensor [P, d]."""
        codes = self.codes[index]
        outliers = None if self.outliers is None else self.outliers[index]
        shape = torch.Size((codes.shape[0], self.shape[-1]))
        return replace(self, codes=codes, absmax=self.absmax[index], outliers=outliers, shape=shape)

    @classmethod
    def from_bnb(cls, packed, quant_state=None):
        """Take over what bitsandbytes quantised to NF4, without copying the codes.

        Arguments
            packed: a `Params4bit`, or the first of what `bitsandbytes.functional.quantize_4bit` returns.
            quant_state: its QuantState; of a `Params4bit` its own. Nested (8-bit) absmax is decoded to float32.

        Raises ValueError for what is not the canonical layout: another code than NF4, a layout repacked for CPU
        products, a transposed view, or blocks that cross rows.
        """
        state = quant_state if quant_state is not None else getattr(packed, "quant_state", None)
        _checks.tensor("packed", packed, "of bitsandbytes 4-bit codes")
        if state is None:
            raise ValueError("quant_state: got None, expected what bitsandbytes returned beside the codes; pass it too")
        if state.quant_type != "nf4":
            raise ValueError(f"quant_state: got quant_type {state.quant_type!r}, expected 'nf4'; quantise it to NF4")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "packed: got bitsandbytes' layout repacked for CPU products, expected its canonical one; take the "
                "weight before its first product on the CPU, or from its state_dict()"
            )
        if state.dtype not in _checks.DTYPES:
            raise ValueError(f"quant_state: got dtype {state.dtype}, expected float32, float16 or bfloat16")
        if packed.dim() == 2 and packed.shape[0] == 1 and packed.shape[1] > 1:
            raise ValueError(f"packed: got a transposed view {tuple(packed.shape)}, expected the codes; pass .t()")
        shape, blocksize = torch.Size(state.shape), state.blocksize
        width = shape[-1]
        if blocksize not in BLOCKSIZES or width % blocksize:
            raise ValueError(
                f"quant_state: got blocks of {blocksize} in rows of {width}, expected blocks that do not cross rows; "
                f"quantise with a blocksize that divides {width}"
            )
        codes = packed.data.reshape(-1).view(torch.uint8)
        if 2 * codes.numel() != shape.numel():
            raise ValueError(
                f"packed: got {codes.numel()} bytes, expected {shape.numel() // 2} for the shape {tuple(shape)} of "
                "quant_state; pass the codes and the state of one tensor"
            )
        absmax = _bnb_absmax(state)
        if absmax.dtype != torch.float32 or absmax.numel() != shape.numel() // blocksize:
            raise ValueError(
                f"quant_state: got absmax of {absmax.numel()} {absmax.dtype}, expected {shape.numel() // blocksize} of "
                "float32, or nested ones with their state2"
            )
        tokens = shape[:-1].numel()
        return cls(
            codes.view(tokens, width // 2), absmax.view(tokens, width // blocksize), None, None, shape, state.dtype,
            blocksize,
        )  # fmt: skip


def _bnb_absmax(state):
    """The scales of a QuantState; nested ones are 8-bit codes with scales of their own and an offset."""
    nested = state.state2
    if nested is None:
        return state.absmax
    scale = nested.absmax.repeat_interleave(nested.blocksize)[: state.absmax.numel()]
    return nested.code[state.absmax.to(torch.int64)] * scale + state.offset


@torch.no_grad()
def outlier_channels(sample, n):
    """The `n` channels with the largest root mean square over the tokens of `sample` [..., d], int32, ascending.

    Choose them once a layer, from a sample of its hidden states, and store them: a few channels of a residual stream
    are tens of times larger than the rest, and would crush the blocks of 4-bit codes that they lie in.
    """
    tokens = _hidden("sample", sample)
    _count("n", n, "sample", sample)
    size = torch.linalg.vector_norm(tokens, dim=0, dtype=torch.float64)  # squares leave fp32's range
    return size.topk(n).indices.sort().values.to(torch.int32)


@torch.no_grad()
def quantize_nf4(h, *, blocksize=64, outliers=0):
    """Hidden states to 4 bits: blocks along each row, scaled by their largest magnitude, to the nearest of 16 values.

    Arguments
        h: hidden states [..., d], float32, float16 or bfloat16.
        blocksize: elements that share a scale, a power of two from 16 to 4096 that divides d.
        outliers: channels that are kept as they are and count as 0 in their blocks: how many to pick from `h` itself by
            `outlier_channels`, or which ones, an int tensor [n], picked before.

    Returns an `NF4Tensor`; without outliers its codes and scales are those of bitsandbytes, bit for bit. No gradient.
    A block with NaN or Inf comes back as NaN and Inf.

    Raises TypeError or ValueError, before any work, for a wrong dtype, shape, device or blocksize.

    Costs one read of h, and d/2 + 4 d/blocksize bytes written a token, more for outliers.

    NF4: Dettmers et al., arXiv 2305.14314.
    """
    tokens = _hidden("h", h)
    width = tokens.shape[1]
    if not isinstance(blocksize, int) or blocksize not in BLOCKSIZES or width % blocksize:
        fitting = [size for size in BLOCKSIZES if width % size == 0]
        hint = f"one of {', '.join(map(str, fitting))}" if fitting else "a width that is a multiple of 16"
        raise ValueError(f"blocksize: got {blocksize} for a width of {width}, expected {hint}")
    channels = _channels(outliers, h)
    codes, absmax, kept = quantize(tokens, blocksize, channels)
    return NF4Tensor(codes, absmax, channels, None if channels is None else kept, h.shape, h.dtype, blocksize)


def _hidden(name, h):
    _checks.tensor(name, h, "[..., d] of hidden states")
    if h.dim() == 0:
        raise ValueError(f"{name}: got a scalar, expected hidden states [..., d]")
    return _checks.hidden(name, h, h.shape[-1])


def _count(name, value, of, h):
    """Check a number of channels of `h`, the argument named `of`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= h.shape[-1]:
        raise ValueError(f"{name}: got {value!r}, expected 0 to {h.shape[-1]} as {of} is {tuple(h.shape)}")


def _channels(outliers, h):
    """`outliers` as int32 channels, ascending; None where there are none."""
    if isinstance(outliers, int):
        _count("outliers", outliers, "h", h)
        return outlier_channels(h, outliers) if outliers else None
    _checks.tensor("outliers", outliers, "of int channels [n], or how many to pick")
    if outliers.dim() != 1 or outliers.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"outliers: got {outliers.dtype} {tuple(outliers.shape)}, expected int channels [n]")
    _checks.same_device(h, outliers=outliers)
    if _checks.known(outliers) and outliers.numel():
        low, high = (int(end) for end in outliers.aminmax())
        if low < 0 or high >= h.shape[-1]:
            raise ValueError(f"outliers: got channel {low if low < 0 else high}, expected 0 to {h.shape[-1] - 1}")
    return outliers.to(torch.int32).sort().values if outliers.numel() else None
