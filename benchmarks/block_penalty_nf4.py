"""What the block penalty adds to a training step when the reference's hidden state is held in four bits.

As people do it today, the whole reference is dequantised first; the fused op decodes a few rows at a time.
"""

from functools import partial

import torch

import lockin_fast
from benchmarks import peers
from benchmarks.block_penalty import TOKENS, WIDTH, Layers, eager, upcast
from benchmarks.case import Case, Work
from lockin_fast.kernels.codebook import CODEBOOK

LATENTS = 20


def looked_up(reference, dtype):
    """Dequantised in plain torch: both codes of a byte from a table, times the block's scale."""
    levels = torch.tensor(CODEBOOK, dtype=dtype)
    codes = torch.stack((reference.codes >> 4, reference.codes & 15), dim=-1).int()
    blocks = levels[codes].view(*reference.absmax.shape, -1) * reference.absmax[..., None].to(dtype)
    return blocks.view(reference.shape)


def work(dtype=torch.bfloat16, tokens=TOKENS, width=WIDTH):
    torch.manual_seed(0)
    weight = torch.randn(LATENTS, width).div_(width**0.5).to(dtype)
    bias, sign = torch.zeros(LATENTS), torch.ones(LATENTS)
    low_bias = bias.to(dtype)
    x = torch.randn(tokens, width).to(dtype)
    base = x - 0.3 * torch.randn(tokens, width).to(dtype)
    reference = lockin_fast.quantize_nf4(base)
    x.requires_grad_()
    layers = Layers(torch.randn(tokens, width).to(dtype))

    def dequantised(decode, penalty):
        return layers.step(x, lambda h: penalty(h, decode(), None, weight, low_bias, sign))

    others = {}
    for name, (quantise, dequantise) in peers.nf4().items():
        decode = partial(dequantise, quantise(base))
        others[f"{name}, then eager"] = dequantised(decode, eager)
        others[f"{name}, then torch.compile"] = dequantised(decode, torch.compile(eager))
        others[f"{name}, then eager fp32 upcast"] = dequantised(decode, upcast)

    def tapped():
        h, penalty = lockin_fast.block_penalty_tap(layers.below(x), weight, bias, sign, h_ref=reference)
        (layers.above(h) + 1e-3 * penalty.total).backward()

    return Work(
        {
            "no penalty": layers.step(x, None),
            "table look-up, then eager": dequantised(partial(looked_up, reference, dtype), eager),
            **others,
            "block_penalty": layers.step(
                x, lambda h: lockin_fast.block_penalty(h, weight, bias, sign, h_ref=reference).total
            ),
            "block_penalty_tap": tapped,
        },
        ours=("block_penalty", "block_penalty_tap"),
        bytes=3 * tokens * width * x.element_size() + reference.nbytes,
        flops=int(2.25 * 2 * tokens * width * LATENTS),
        without="no penalty",
    )


def cases():
    shape = {"T": TOKENS, "d": WIDTH, "K": LATENTS, "dtype": torch.bfloat16}
    yield Case("reference in NF4", shape, work, ("block_penalty_nf4", "latent_backward_"))
