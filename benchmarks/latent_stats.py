"""Statistics of every latent of a whole SAE over a batch: latent_stats against encoding everything."""

import argparse
import sys
import time
from functools import partial

import torch

import lockin_fast
from benchmarks.measure import peak_memory, write_csv


def encode_everything(h, h_ref, weight, bias):
    """As users write it: all latents of both streams, then the sums."""
    z = torch.relu(torch.nn.functional.linear(h, weight, bias))
    z_ref = torch.relu(torch.nn.functional.linear(h_ref, weight, bias))
    value = z.float() - z_ref.float()
    return value.sum(0), value.square().sum(0), (z > 0).sum(0), (z_ref > 0).sum(0)


def fused(h, h_ref, weight, bias):
    return lockin_fast.latent_stats(h, weight, bias, h_ref=h_ref)


def main(arguments=()):
    parser = argparse.ArgumentParser(prog="benchmarks.latent_stats", description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--latents", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    tokens, width, latents = options.tokens, options.width, options.latents
    print(f"Latent statistics of two streams: T={tokens}, d={width}, F={latents}")
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        h, h_ref = (torch.randn(tokens, width, generator=generator).to(dtype) for _ in range(2))
        weight = (torch.randn(latents, width, generator=generator) / width**0.5).to(dtype)
        bias = torch.full((latents,), -2.0).to(dtype)
        seconds, extra = {}, {}
        for _ in range(options.rounds):
            for provider in (encode_everything, fused):
                start = time.perf_counter()
                peak = peak_memory(partial(provider, h, h_ref, weight, bias))
                seconds.setdefault(provider.__name__, []).append(time.perf_counter() - start)
                extra[provider.__name__] = max(extra.get(provider.__name__, 0), peak)
        for name, taken in seconds.items():
            median = sorted(taken)[len(taken) // 2]
            gflops = 4 * tokens * width * latents / median / 1e9
            megabytes = extra[name] / 1e6
            print(f"  {str(dtype)[6:]:<10}{name:<20}{median:>7.2f} s {gflops:>7.0f} GFLOP/s {megabytes:>8.0f} MB extra")
            rows.append(
                {
                    "dtype": str(dtype)[6:], "tokens": tokens, "width": width, "latents": latents, "provider": name,
                    "seconds": round(median, 3), "low": round(min(taken), 3), "high": round(max(taken), 3),
                    "gflop_per_s": round(gflops), "extra_mb": round(megabytes, 1), "runs": len(taken),
                }
            )  # fmt: skip
    print(f" written to {write_csv('latent_stats', rows)}")


if __name__ == "__main__":
    main(sys.argv[1:])
