"""The k largest latents of a whole SAE per token, against encoding everything and picking from it."""

from functools import partial

import torch

import lockin_fast
from benchmarks import peers
from benchmarks.case import Case, Work

TOKENS, WIDTH, LATENTS, KEPT = 2048, 4096, 65536, 64


def encode_everything(h, weight, bias, k):
    """As users write it: all latents, then torch.topk."""
    return torch.relu(torch.nn.functional.linear(h, weight, bias)).topk(k, dim=-1)


def work(latents, dtype):
    torch.manual_seed(0)
    h = torch.randn(TOKENS, WIDTH).to(dtype)
    weight = torch.randn(latents, WIDTH).div_(WIDTH**0.5).to(dtype)
    bias = torch.full((latents,), -2.0).to(dtype)
    out = torch.empty(TOKENS, latents, dtype=dtype)
    others = {name: partial(encode, h) for name, encode in peers.topk_encoders(weight, bias, KEPT).items()}
    return Work(
        {
            "bare product": lambda: torch.mm(h, weight.t(), out=out),
            "encode everything": partial(encode_everything, h, weight, bias, KEPT),
            "torch.compile": partial(torch.compile(encode_everything), h, weight, bias, KEPT),
            **others,
            "encode_topk": partial(lockin_fast.encode_topk, h, weight, bias, KEPT),
        },
        ours=("encode_topk",),
        bytes=(TOKENS + latents) * WIDTH * h.element_size() + 12 * TOKENS * KEPT,
        flops=2 * TOKENS * WIDTH * latents,
        bare="bare product",
    )


def cases():
    for dtype, latents in ((torch.bfloat16, LATENTS), (torch.float32, LATENTS // 4)):
        shape = {"T": TOKENS, "d": WIDTH, "F": latents, "k": KEPT, "dtype": dtype}
        yield Case(str(dtype)[6:], shape, partial(work, latents, dtype), ("encode_topk",), 3, ("default",))
