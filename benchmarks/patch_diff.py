"""patch_diff reads what a patch would change once, and stores no difference."""

import torch
from torch.nn.functional import linear

import lockin_fast
from benchmarks.case import Case, Work


def work(positions, width, latents, tokens):
    torch.manual_seed(0)
    h = torch.randn(tokens, width).bfloat16()
    source = torch.randn(positions, width).bfloat16()
    rows = torch.randperm(tokens)[:positions].sort().values
    weight = (torch.randn(latents, width) / width**0.5).bfloat16()
    bias = torch.zeros(latents)
    low, wide = bias.bfloat16(), weight.float()

    def eager(h, source, weight, bias):
        before = h[rows].to(weight.dtype)
        diff = source.to(weight.dtype) - before
        change = linear(source.to(weight.dtype), weight, bias).relu() - linear(before, weight, bias).relu()
        return diff.norm(dim=1), diff @ weight.t(), change

    def two_products(h, source, weight, bias):
        before = h[rows].to(weight.dtype)
        diff = source.to(weight.dtype) - before
        moved, pre = diff @ weight.t(), linear(before, weight, bias)
        return diff.norm(dim=1), moved, (pre + moved).relu() - pre.relu()

    compiled = torch.compile(two_products)
    providers = {
        "eager bf16": lambda: eager(h, source, weight, low),
        "eager bf16, two products": lambda: two_products(h, source, weight, low),
        "eager fp32": lambda: eager(h, source, wide, bias),
        "torch.compile bf16": lambda: compiled(h, source, weight, low),
        "patch_diff": lambda: lockin_fast.patch_diff(h, rows, source, weight, bias),
    }
    return Work(providers, ("patch_diff",), 4 * positions * width, 4 * positions * width * latents)


def cases():
    for latents in (20, 100):
        shape = {"P": 2048, "N": 4096, "d": 4096, "K": latents, "dtype": torch.bfloat16}
        yield Case(f"K={latents}", shape, lambda k=latents: work(2048, 4096, k, 4096), ("patch_diff",))
