"""Statistics of every latent of a whole SAE over a batch, against encoding everything."""

from functools import partial

import torch

import lockin_fast
from benchmarks import peers
from benchmarks.case import Case, Work

TOKENS, WIDTH, LATENTS = 2048, 4096, 65536


def reduced(z, z_ref=None):
    value = z.float() if z_ref is None else z.float() - z_ref.float()
    counts = [(active > 0).sum(0) for active in (z, z_ref) if active is not None]
    return value.sum(0), value.square().sum(0), *counts


def encode_everything(h, h_ref, weight, bias):
    """As users write it: all latents of both streams, then the sums."""
    streams = [h] if h_ref is None else [h, h_ref]
    return reduced(*(torch.relu(torch.nn.functional.linear(x, weight, bias)) for x in streams))


def work(latents, dtype, streams):
    torch.manual_seed(0)
    h, h_ref = (*(torch.randn(TOKENS, WIDTH).to(dtype) for _ in range(streams)), None)[:2]
    weight = torch.randn(latents, WIDTH).div_(WIDTH**0.5).to(dtype)
    bias = torch.full((latents,), -2.0).to(dtype)
    out = torch.empty(TOKENS, latents, dtype=dtype)

    def product():
        for _ in range(streams):
            torch.mm(h, weight.t(), out=out)

    def encoded_by(encode):
        return lambda: reduced(*(encode(x) for x in (h, h_ref) if x is not None))

    others = {name: encoded_by(encode) for name, encode in peers.sae_encoders(weight, bias).items()}
    return Work(
        {
            "bare product": product,
            "encode everything": partial(encode_everything, h, h_ref, weight, bias),
            "torch.compile": partial(torch.compile(encode_everything), h, h_ref, weight, bias),
            **others,
            "latent_stats": partial(lockin_fast.latent_stats, h, weight, bias, h_ref=h_ref),
        },
        ours=("latent_stats",),
        bytes=(streams * TOKENS + latents) * WIDTH * h.element_size(),
        flops=2 * streams * TOKENS * WIDTH * latents,
        bare="bare product",
    )


def cases():
    # In fp32 a quarter of the width says the same in a quarter of the time.
    for dtype, latents in ((torch.bfloat16, LATENTS), (torch.float32, LATENTS // 4)):
        for streams, label in ((1, "one stream"), (2, "difference of two streams")):
            shape = {"T": TOKENS, "d": WIDTH, "F": latents, "dtype": dtype}
            name = f"{label}, {str(dtype)[6:]}"
            yield Case(name, shape, partial(work, latents, dtype, streams), ("latent_stats",), 3, ("default",))
