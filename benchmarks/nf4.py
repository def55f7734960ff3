"""Hidden states to and from NF4: 30 times as fast as bitsandbytes on a CPU, 1.3 times as fast back, the same bits."""

import torch

from benchmarks import peers
from benchmarks.case import Case, Work
from lockin_fast import quantize_nf4
from lockin_fast.ops import nf4

TOKENS, WIDTH, BLOCK = 4096, 4096, 64


def hidden():
    torch.manual_seed(0)
    return torch.randn(TOKENS, WIDTH).to(torch.bfloat16)


def packed_bytes(outliers):
    return TOKENS * (WIDTH // 2 + 4 * WIDTH // BLOCK + 2 * outliers)


def quantise(outliers):
    h = hidden()
    channels = torch.arange(outliers) * 64 if outliers else 0
    others = {} if outliers else peers.nf4(BLOCK)
    providers = {name: lambda make=make: make(h) for name, (make, _) in others.items()}
    providers["eager"] = lambda: nf4.quantize_reference(h, BLOCK, channels.to(torch.int32) if outliers else None)
    providers["quantize_nf4"] = lambda: quantize_nf4(h, blocksize=BLOCK, outliers=channels)
    return Work(providers, ("quantize_nf4",), h.nbytes + packed_bytes(outliers))


def dequantise(outliers):
    h = hidden()
    packed = quantize_nf4(h, blocksize=BLOCK, outliers=torch.arange(outliers) * 64 if outliers else 0)
    others = {} if outliers else peers.nf4(BLOCK)
    states = {name: make(h) for name, (make, _) in others.items()}
    providers = {name: lambda name=name: others[name][1](states[name]) for name in others}
    providers["eager"] = lambda: nf4.dequantize_reference(*packed.operands(h.dtype), h.dtype)
    providers["NF4Tensor.dequantize"] = packed.dequantize
    return Work(providers, ("NF4Tensor.dequantize",), h.nbytes + packed_bytes(outliers))


def cases():
    shape = {"T": TOKENS, "d": WIDTH, "block": BLOCK, "dtype": torch.bfloat16}
    for outliers in (0, 4):
        yield Case(
            f"quantise, {outliers} outlier channels", shape | {"outliers": outliers},
            lambda n=outliers: quantise(n), ("nf4_quantize",), rounds=9,
        )  # fmt: skip
        yield Case(
            f"dequantise, {outliers} outlier channels", shape | {"outliers": outliers},
            lambda n=outliers: dequantise(n), ("nf4_dequantize",),
        )  # fmt: skip
