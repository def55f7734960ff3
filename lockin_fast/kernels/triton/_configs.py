"""What the kernels are launched with: tile sizes, warps and pipeline stages, by kind of chip and shape.

A narrow op (some dozens of latents) is bound by reading the hidden states: it needs tens of kilobytes on their way to
every multiprocessor, and a tile of tokens for each. A wide one is bound by its product: it needs the largest tile whose
accumulators stay in registers. LOCKIN_FAST_AUTOTUNE=1 measures instead of believing these figures; see `_autotune`.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton

from lockin_fast.kernels import Refused
from lockin_fast.kernels.triton._autotune import measured

INTERPRETING = triton.knobs.runtime.interpret
WIDE_LATENTS = 128  # more than these are tiled like a large product


class Chip(NamedTuple):
    """A chip as the configurations know it."""

    kind: int  # 80: 163 KB of shared memory; 90: 227 KB, wgmma; 100: 227 KB, tcgen05; 120: 99 KB, as 8.6 and 8.9
    processors: int


@cache
def chip(device):
    """The chip that is `device`; some large one where nothing is a chip."""
    if device.type != "cuda":
        return Chip(90, 132)
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise Refused(f"the Triton kernels need compute capability 8.0, this GPU has {major}.{minor}")
    kind = 80 if (major, minor) == (8, 0) else {9: 90, 10: 100}.get(major, 120)
    return Chip(kind, torch.cuda.get_device_properties(device).multi_processor_count)


def config(tokens, latents, row, warps, stages):
    return {"BLOCK_T": tokens, "BLOCK_K": latents, "row": row, "num_warps": warps, "num_stages": stages}


# For 16-bit operands: tokens, latents, bytes of a row of either in a stage, warps, stages.
WIDE = {
    "encode": {
        80: config(128, 128, 128, 8, 4),
        90: config(256, 128, 128, 8, 4),
        100: config(256, 128, 128, 8, 4),
        120: config(128, 128, 128, 8, 4),
    },
    "stats": {
        80: config(128, 128, 128, 8, 4),
        90: config(256, 128, 128, 8, 4),
        100: config(256, 128, 128, 8, 4),
        120: config(128, 128, 128, 8, 4),
    },
    "stats of two": {  # the tokens of a tile count twice
        80: config(64, 128, 128, 8, 4),
        90: config(128, 128, 128, 8, 4),
        100: config(128, 128, 128, 8, 4),
        120: config(64, 128, 128, 8, 4),
    },
}
# No tensor cores for fp32 products: the tile is what the registers hold, and the sums of latent_stats take some more.
FP32 = config(64, 64, 128, 8, 3)
FP32_STATS = config(64, 64, 64, 8, 3)


def launch(found, dtype):
    """The arguments of a launch: rows in elements of `dtype`."""
    sizes = dict(found)
    return sizes | {"BLOCK_D": sizes.pop("row") // dtype.itemsize, "UPCAST": INTERPRETING}


def wide(which, h, latents, trial):
    """Configuration of a full-width product of `h`; `trial` launches it once with another, for the autotuner."""
    if h.dtype == torch.float32:
        own = FP32 if which == "encode" else FP32_STATS
    else:
        own = WIDE[which][chip(h.device).kind]
    others = [own, config(128, 128, 128, 8, 4), config(128, 128, 128, 8, 3), config(128, 128, 128, 4, 3)]
    others += [config(own["BLOCK_T"], own["BLOCK_K"], 128, 8, 3), config(64, 128, 128, 4, 4)]
    return launch(measured(which, h, latents, own, others, lambda c: trial(launch(c, h.dtype))), h.dtype)


def narrow(which, h, latents, trial):
    """Configuration of an op that reads `h` once for all its latents."""
    kind, processors = chip(h.device)
    most = 32 if h.dtype == torch.float32 else WIDE_LATENTS  # products in fp32 hold their operands in registers
    block = min(max(triton.next_power_of_2(latents), 16), most)
    row = 256 if block <= 32 and h.dtype != torch.float32 else 128
    tokens = 32 if INTERPRETING or triton.cdiv(h.shape[0], 32) * 10 >= processors * 9 else 16
    warps = 8 if block > 32 else 4  # what the accumulators of both streams take
    own = config(tokens, block, row, warps, 4 if kind == 120 else 5)
    others = [config(t, block, r, 4, s) for t in (16, 32, 64) for r in (128, 256) for s in (3, 4, 5)]
    return launch(measured(which, h, latents, own, others, lambda c: trial(launch(c, h.dtype))), h.dtype)


def backward(weight, latents):
    """Configuration of the gradient's outer product. A 16-bit weight is exact in tf32, whose three-term product keeps
    the fp32 coefficients and runs on tensor cores; fp32 products stay fp32.
    """
    return {
        "BLOCK_T": 32 if INTERPRETING else 16,
        "BLOCK_K": min(max(triton.next_power_of_2(latents), 16), 32),
        "BLOCK_D": 128,
        "PRECISION": "ieee" if weight.dtype == torch.float32 or INTERPRETING else "tf32x3",
        "num_warps": 4,
        "num_stages": 2,
    }
