"""How much a device holds, and how fast it multiplies and copies."""

import re
import time
from dataclasses import dataclass

import torch

GIB = 2**30
# What a training step reaches of a data sheet's peak, as a rule of thumb: half of the products, 80% of the copies.
FLOPS_REACHED, BANDWIDTH_REACHED = 0.5, 0.8
# The driver's context and the libraries' workspaces, and what an allocator loses in gaps.
CONTEXT, GAPS = 0.75 * GIB, 0.04
# Makers' data sheets: memory in GiB, dense bf16 products with fp32 sums (T4: fp16) in TFLOP/s, bandwidth in GB/s.
DATA_SHEETS = {
    "t4": (16, 65, 320),
    "l4": (24, 121, 300),
    "a10": (24, 125, 600),
    "rtx3090": (24, 71, 936),
    "rtx4090": (24, 165, 1008),
    "a100-40gb": (40, 312, 1555),
    "l40s": (48, 362, 864),
    "a100": (80, 312, 2039),
    "h100": (80, 989, 3350),
    "h200": (141, 989, 4800),
}


@dataclass(frozen=True)
class Device:
    """memory in bytes; products (FLOP/s) and copies (bytes/s) as a step reaches them, None where nothing is known."""

    name: str
    memory: int
    flops: float | None = None
    bandwidth: float | None = None
    source: str = ""

    @property
    def usable(self) -> int:
        """What is left for tensors."""
        return int((self.memory - CONTEXT) * (1 - GAPS))


def read_device(text: str, flops: float | None = None, bandwidth: float | None = None) -> Device:
    """ "24GB" (of 2^30 bytes, as GPUs are sold) or a name of `DATA_SHEETS`; `flops` and `bandwidth` win over the table.

    Raises ValueError, one line that lists what is known.
    """
    amount = re.fullmatch(r"([\d.]+)\s*G(?:i?B)?", text.strip(), re.IGNORECASE)
    key = re.sub(r"[\s_]|nvidia|geforce", "", text.lower())
    for name, value in (("flops", flops), ("bandwidth", bandwidth)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name}: got {value}, expected a rate above 0, such as 1e12")
    if amount and 0 < (gib := float(amount[1])):
        given = "as given" if flops or bandwidth else ""
        return Device(text, int(gib * GIB), flops, bandwidth, given)
    if key not in DATA_SHEETS:
        raise ValueError(f"gpu: got {text!r}, expected a size such as 24GB, or one of {', '.join(DATA_SHEETS)}")
    gib, teraflops, gigabytes = DATA_SHEETS[key]
    return Device(
        text,
        gib * GIB,
        flops or teraflops * 1e12 * FLOPS_REACHED,
        bandwidth or gigabytes * 1e9 * BANDWIDTH_REACHED,
        f"{FLOPS_REACHED:.0%} of {teraflops} TFLOP/s, {BANDWIDTH_REACHED:.0%} of {gigabytes} GB/s"
        if not (flops or bandwidth)
        else "as given",
    )


def measured(device: Device, dtype: torch.dtype) -> Device:
    """`device` with the rates of this machine: its GPU, or the CPU, in `dtype`. Takes a second or two."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    size = 4096 if where == "cuda" else 1024
    a, b = (torch.randn(size, size, device=where).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.empty(2**26, dtype=torch.float32, device=where)
    target = torch.empty_like(source)
    flops = 2 * size**3 / _seconds(lambda: torch.mm(a, b, out=out), where)
    bandwidth = 2 * source.nbytes / _seconds(lambda: target.copy_(source), where)
    found = torch.cuda.get_device_name() if where == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return Device(device.name, device.memory, flops, bandwidth, f"measured here ({found})")


def _seconds(function, where: str) -> float:
    """The best of some runs."""
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        function()
        if where == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
