"""patch_ writes listed rows at the speed of a copy of their bytes; index assignment takes several times that."""

import torch

import lockin_fast
from benchmarks.case import Case, Work


def work(positions, width, tokens, packed):
    torch.manual_seed(0)
    h = torch.randn(tokens, width).bfloat16()
    source = torch.randn(positions, width).bfloat16()
    rows = torch.randperm(tokens)[:positions].sort().values

    def assign():
        h[rows] = source
        return h

    if not packed:
        providers = {
            "index assignment": assign,
            "index_copy_": lambda: h.index_copy_(0, rows, source),
            "patch_": lambda: lockin_fast.patch_(h, rows, source),
        }
        return Work(providers, ("patch_",), 4 * positions * width)
    codes = lockin_fast.quantize_nf4(source, outliers=8)

    def decoded():
        h[rows] = codes.dequantize()
        return h

    providers = {
        "dequantise, index assignment": decoded,
        "dequantise, index_copy_": lambda: h.index_copy_(0, rows, codes.dequantize()),
        "patch_": lambda: lockin_fast.patch_(h, rows, codes),
    }
    return Work(providers, ("patch_",), codes.nbytes + 2 * positions * width)


def cases():
    shape = {"P": 2048, "N": 4096, "d": 4096, "dtype": torch.bfloat16}
    yield Case("2,048 rows, bf16", shape, lambda: work(2048, 4096, 4096, False), ("patch_",), 50)
    yield Case("2,048 rows from NF4", shape, lambda: work(2048, 4096, 4096, True), ("patch_nf4_",), 50)
    shape = {"P": 4, "N": 512, "d": 4096, "dtype": torch.bfloat16}
    yield Case("4 rows, bf16", shape, lambda: work(4, 4096, 512, False), ("patch_",), 200)
