"""Per-latent sums over tokens for a whole SAE, of one stream or of the difference of two, without ever holding [T, F].

At these widths the matrix product is nearly all of the time. On a CPU below AVX-512 torch's own is as fast as any, so
the reference here, which only decides the tiles and what is accumulated, is the kernel too; from AVX-512 on the
compiled part serves: no thread waits for another, and bf16 operands are multiplied as they are.
"""

from dataclasses import dataclass, fields

import torch

from lockin_fast.dispatch import define, stock
from lockin_fast.ops import _checks, _wide
from lockin_fast.ops.nf4_tensor import NF4Tensor

SCHEMA = (
    "(Tensor h, Tensor weight, Tensor bias, Tensor? h_ref, Tensor? threshold, Tensor? mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
DECODED_ELEMENTS = 2**22  # of an NF4 reference at a time: 16 MB in fp32


@dataclass(frozen=True)
class LatentStats:
    """Sums over tokens, per latent. Stats of different batches merge by `+` (and `sum(...)`).

    With a reference stream, `sum` and `sum_squares` are of z - z_ref, and `count` and `count_ref` are how many tokens
    each stream was active on; without one `count_ref` is empty.
    """

    sum: torch.Tensor  # [F] fp64
    sum_squares: torch.Tensor  # [F] fp64
    count: torch.Tensor  # [F] int64
    count_ref: torch.Tensor  # [F] int64, or [0]
    tokens: torch.Tensor  # int64 scalar

    @property
    def mean(self):
        """Mean over tokens, [F] fp64; NaN when there were none."""
        return self.sum / self.tokens

    @property
    def var(self):
        """Population variance over tokens, [F] fp64; NaN when there were none."""
        return (self.sum_squares / self.tokens - self.mean.square()).clamp_min(0.0)

    @property
    def rate(self):
        """Fraction of tokens on which the latent is active, [F] fp64; NaN when there were none."""
        return self.count.double() / self.tokens

    def __add__(self, other):
        if not isinstance(other, LatentStats):
            return NotImplemented
        if self.sum.shape != other.sum.shape or self.count_ref.shape != other.count_ref.shape:
            raise ValueError(
                f"LatentStats: cannot merge {self._kind()} with {other._kind()}; merge stats of one SAE and one kind"
            )
        return LatentStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __radd__(self, other):
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def _kind(self):
        return f"{self.sum.shape[0]} latents of {'a difference' if self.count_ref.shape[0] else 'one stream'}"


def reference(h, weight, bias, h_ref, threshold, mask):
    """Plain torch over tiles of tokens and latents, every large buffer allocated once; sums in fp64."""
    latents, width = weight.shape
    chosen = None
    if mask is not None and h.device.type == "cpu":  # elsewhere the number of tokens would have to be waited for
        chosen = mask.nonzero().squeeze(1)
    tokens = h.shape[0] if chosen is None else chosen.shape[0]
    rows, columns = _wide.tile_shape(tokens, width, latents)
    streams = [h] if h_ref is None else [h, h_ref]
    sums, squares = (torch.zeros(latents, dtype=torch.float64, device=h.device) for _ in range(2))
    counts = [torch.zeros(latents, dtype=torch.int64, device=h.device) for _ in streams]
    work = torch.promote_types(h.dtype, torch.float32)
    operands = [_wide.Buffer((rows, width), work, h.device) for _ in streams]
    weights = _wide.Buffer((columns, width), work, h.device)
    products = [_wide.Buffer((rows, columns), work, h.device) for _ in streams]
    wide = _wide.Buffer((rows, columns), torch.float64, h.device)

    for t0 in range(0, tokens, rows):
        block = slice(t0, min(t0 + rows, tokens))
        picked = [x[block] if chosen is None else x.index_select(0, chosen[block]) for x in streams]
        tiles = [operand.holding(x) for operand, x in zip(operands, picked, strict=True)]
        dropped = None if mask is None or chosen is not None else ~mask[block, None]
        for k0 in range(0, latents, columns):
            part = slice(k0, min(k0 + columns, latents))
            w, b = weights.holding(weight[part]).t(), bias[part].to(work)
            floor = None if threshold is None else threshold[part]
            shape = block.stop - block.start, part.stop - part.start
            z = [
                _wide.encode_tile(x, w, b, floor, product.shaped(*shape))
                for x, product in zip(tiles, products, strict=True)
            ]
            if dropped is not None:  # set to zero, whatever they hold
                z = [activation.masked_fill_(dropped, 0.0) for activation in z]
            for count, activation in zip(counts, z, strict=True):
                count[part] += (activation > 0).sum(0)
            value = wide.shaped(*shape).copy_(z[0] if h_ref is None else z[0].sub_(z[1]))
            sums[part] += value.sum(0)
            squares[part] += value.square_().sum(0)

    total = mask.sum() if mask is not None else torch.full((), tokens, dtype=torch.int64, device=h.device)
    return sums, squares, counts[0], counts[1] if h_ref is not None else counts[0].new_zeros(0), total


def _fake(h, weight, bias, h_ref, threshold, mask):
    latents = weight.shape[0]
    sums = [h.new_empty((latents,), dtype=torch.float64) for _ in range(2)]
    counts = [h.new_empty((n,), dtype=torch.int64) for n in (latents, 0 if h_ref is None else latents)]
    return *sums, *counts, h.new_empty((), dtype=torch.int64)


define("latent_stats", SCHEMA, reference, _fake)
stock("latent_stats", "stock torch matrix products over tiles are as fast below AVX-512")
_op = torch.ops.lockin_fast.latent_stats.default


@torch.no_grad()
def latent_stats(h, weight, bias, *, h_ref=None, threshold=None, mask=None):
    """Sum, sum of squares and active count of every latent over the tokens, [F] each; never [T, F].

        z       = relu(h W^T + b) * (h W^T + b > threshold)
        value   = z, or z - z_ref with z_ref the same of h_ref
        sum     = sum over masked tokens of value;   sum_squares likewise of value^2
        count   = tokens with z > 0;                 count_ref = tokens with z_ref > 0

    Arguments
        h: hidden states [..., d], float32, float16 or bfloat16.
        weight, bias: encoder rows [F, d] and [F] in normal form; cast to h's dtype, 16 MB at a time, and float32.
        h_ref: a second stream of the same tokens, shape and dtype of h; or an `NF4Tensor` of that shape, decoded to
            h's dtype some tokens at a time, 16 MB at most.
        threshold: JumpReLU thresholds [F]; None is a plain ReLU.
        mask: bool [...], True for tokens that count. None counts all.

    Returns `LatentStats`, which merges across batches by `+` and gives `.mean`, `.var` and `.rate`. Sums are float64.
    No gradient. NaN and Inf in a counted token reach the sums; in a masked token they do not.

    Raises TypeError or ValueError, before any work, for a wrong dtype, shape or device.

    Costs 2 T d F FLOPs per stream; on the CPU masked tokens cost nothing, and the scratch memory is a tile's, below
    64 MB whatever T, F and the dtypes, and 3 MB for each thread after the first.

    Stage 1 of latent discovery in BLOCK-EM, arXiv 2602.00767, ranks latents by `.mean` of the difference.
    """
    latents = _checks.rows(weight, bias)
    tokens = _checks.hidden("h", h, weight.shape[1])
    if isinstance(h_ref, NF4Tensor):
        _checks.reference_shape(h_ref, h)
    elif h_ref is not None:
        _checks.tensor("h_ref", h_ref, "of the shape and dtype of h, an NF4Tensor, or None")
        h_ref = _checks.reference(h_ref, h)
    _checks.per_latent("threshold", threshold, latents, optional=True)
    mask = _checks.token_mask(mask, h.shape[:-1])
    _checks.same_device(h, weight=weight, bias=bias, h_ref=h_ref, threshold=threshold, mask=mask)
    bias, threshold = _checks.fp32(bias), _checks.fp32(threshold)
    sums = [
        _sums(tokens, rows, bias[part], h_ref, None if threshold is None else threshold[part], mask)
        for part, rows in _wide.cast_parts(weight, h.dtype)
    ]
    if len(sums) == 1:
        return LatentStats(*sums[0])
    *per_latent, total = zip(*sums, strict=True)
    return LatentStats(*map(torch.cat, per_latent), total[0])


def _sums(h, weight, bias, h_ref, threshold, mask):
    """The op; where the reference is in NF4, on some tokens after others, so that it is never decoded as a whole."""
    if not isinstance(h_ref, NF4Tensor):
        return _op(h, weight, bias, h_ref, threshold, mask)
    size = max(DECODED_ELEMENTS // max(h.shape[1], 1), 1)
    total = None
    for start in range(0, max(h.shape[0], 1), size):
        block = slice(start, start + size)
        decoded = h_ref.rows(block).dequantize(h.dtype)
        sums = _op(h[block], weight, bias, decoded, threshold, None if mask is None else mask[block])
        total = sums if total is None else [a + b for a, b in zip(total, sums, strict=True)]
        del decoded  # before the next is made
    return total
