"""What the block penalty adds to a training step.

A step is reduced to its hidden state: h is an intermediate tensor, and its upstream gradient arrives in the backward.
The time without any penalty is subtracted. On a CPU large fresh tensors are paid in page faults, so everything is
measured twice: with the C library's default allocator, and with one that retains memory.
"""

import argparse
import json
import os
import subprocess
import sys

import torch
from torch.nn.functional import linear

import lockin_fast
from benchmarks.measure import interleaved, write_csv

RETAINED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 34), "MALLOC_TOP_PAD_": str(1 << 28)}
BASELINES = ("eager bf16", "torch.compile")
UPCAST = "eager fp32 upcast"


class _Layers:
    """The model around h: below it nothing is computed, above it a gradient that nobody else holds is handed out."""

    def __init__(self, gradient):
        self.gradients = [gradient]

    def below(self, x):
        return _Below.apply(x, self)

    def above(self, h):
        return _Above.apply(h, self)


class _Below(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layers):
        ctx.layers = layers
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.layers.gradients.append(grad)
        return None, None


class _Above(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, layers):
        ctx.layers = layers
        return h.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        return ctx.layers.gradients.pop(), None


def eager(h, h_ref, weight, bias, sign):
    """As users write it: operands in the model's dtype, the penalty in fp32."""
    z = torch.relu(linear(h, weight, bias))
    with torch.no_grad():
        z_ref = torch.relu(linear(h_ref, weight, bias))
    return torch.relu(sign * (z.float() - z_ref.float())).square().sum()


def upcast(h, h_ref, weight, bias, sign):
    """As published training code does it: hidden states and encoder in fp32."""
    weight, bias = weight.float(), bias.float()
    z = torch.relu(linear(h.float(), weight, bias))
    with torch.no_grad():
        z_ref = torch.relu(linear(h_ref.float(), weight, bias))
    return torch.relu(sign * (z - z_ref)).square().sum()


def steps(tokens, width, latents, dtype):
    """name -> one step with that penalty; all of the same problem, about a quarter of the pairs active."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(tokens, width, generator=generator)
    h_ref = base.to(dtype)
    x = (base + 0.3 * torch.randn(tokens, width, generator=generator)).to(dtype).requires_grad_()
    layers = _Layers(torch.randn(tokens, width, generator=generator).to(dtype))
    weight = (torch.randn(latents, width, generator=generator) / width**0.5).to(dtype)
    bias, sign = torch.zeros(latents), torch.ones(latents)
    low_bias = bias.to(dtype)
    compiled = torch.compile(eager)

    def step(penalty):
        def run():
            h = layers.below(x)
            loss = layers.above(h)
            if penalty is not None:
                loss = loss + 1e-3 * penalty(h)
            loss.backward()

        return run

    def tapped():
        h, penalty = lockin_fast.block_penalty_tap(layers.below(x), weight, bias, sign, h_ref=h_ref)
        (layers.above(h) + 1e-3 * penalty.total).backward()

    fresh = torch.empty_like(h_ref)
    return {
        "no penalty": step(None),
        UPCAST: step(lambda h: upcast(h, h_ref, weight, low_bias, sign)),
        "eager bf16": step(lambda h: eager(h, h_ref, weight, low_bias, sign)),
        "torch.compile": step(lambda h: compiled(h, h_ref, weight, low_bias, sign)),
        "block_penalty": step(lambda h: lockin_fast.block_penalty(h, weight, bias, sign, h_ref=h_ref).total),
        "block_penalty_tap": tapped,
        "copy of h": lambda: fresh.copy_(h_ref),
    }


def measure(tokens, width, latents, rounds):
    timings = interleaved(steps(tokens, width, latents, torch.bfloat16), rounds)
    without = timings.pop("no penalty").median
    copy = timings.pop("copy of h").median
    size = 2 * tokens * width
    rows = []
    for name, timing in timings.items():
        added = timing.median - without
        rows.append(
            {
                "provider": name,
                "added_ms": round(1e3 * added, 3),
                "low_ms": round(1e3 * (timing.low - without), 3),
                "high_ms": round(1e3 * (timing.high - without), 3),
                # Least traffic: h and h_ref read, the gradient read and written.
                "gb_per_s": round(4 * size / added / 1e9, 1),
                "of_copy": round(4 * size / added / (2 * size / copy), 3),
                "copy_gb_per_s": round(2 * size / copy / 1e9, 1),
                "runs": timing.runs,
            }
        )
    return rows


def in_subprocess(arguments, environment):
    command = [sys.executable, "-m", "benchmarks.block_penalty", "--json", *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def show(rows):
    added = {row["provider"]: row["added_ms"] for row in rows}
    best = min(added[name] for name in BASELINES)
    for row in sorted(rows, key=lambda row: -row["added_ms"]):
        ratios = ""
        if row["provider"] not in (*BASELINES, UPCAST):
            mine = row["added_ms"]
            ratios = f"   {best / mine:.1f}x less than the best baseline, {added[UPCAST] / mine:.1f}x than fp32"
        spread = f"({row['low_ms']:.1f} to {row['high_ms']:.1f})"
        print(f"  {row['provider']:<20}{row['added_ms']:>8.2f} ms {spread:<18}{row['of_copy']:>6.0%} of copy{ratios}")


def main(arguments=()):
    parser = argparse.ArgumentParser(prog="benchmarks.block_penalty", description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--latents", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    problem = options.tokens, options.width, options.latents
    if options.json:
        print(json.dumps(measure(*problem, options.rounds)))
        return
    print("Block penalty, added to a step: T={}, d={}, K={}, bf16, h_ref at hand".format(*problem))
    results = []
    for allocator, environment in (("default", {}), ("retained", RETAINED)):
        flags = zip(("--tokens", "--width", "--latents", "--rounds"), (*problem, options.rounds), strict=True)
        rows = in_subprocess([str(part) for flag in flags for part in flag], environment)
        print(f" {allocator} allocator, {options.rounds} interleaved rounds, median (quartiles)")
        show(rows)
        shape = dict(zip(("tokens", "width", "latents"), problem, strict=True))
        results += [{"allocator": allocator, **shape, **row} for row in rows]
    print(f" written to {write_csv('block_penalty', results)}")


if __name__ == "__main__":
    main(sys.argv[1:])
