"""What is known about the kernels for GPUs: which there are in CUDA C++, which have run, and which were faster."""

import csv
import json
from pathlib import Path
from typing import NamedTuple

# The ops that csrc/ops_cuda serves; a test holds this list against the library.
CUDA_OPS = (
    "block_penalty", "block_penalty_nf4", "latent_backward", "latent_backward_", "nf4_dequantize", "nf4_quantize",
    "patch_", "patch_diff", "patch_nf4_", "steer_",
)  # fmt: skip

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
DEFAULTS = Path(__file__).parent / "gpu_defaults.json"


class Run(NamedTuple):
    """One measurement of an op's kernel on a GPU, as a row of benchmarks/results/gpu*.csv has it."""

    op: str
    backend: str
    gpu: str
    commit: str
    file: str


def runs():
    """Every measurement on a GPU in benchmarks/results; a row names one op or several, and without a GPU is none."""
    found = []
    for file in sorted(RESULTS.glob("gpu*.csv")):
        with open(file, newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                if row.get("op") and row.get("gpu"):
                    backend, commit = row.get("backend") or "unknown", row.get("commit") or "unknown"
                    found += [Run(op, backend, row["gpu"], commit, file.name) for op in row["op"].split()]
    return found


def never_run(triton_ops):
    """{backend: ops} of the kernels that no file of benchmarks/results has seen on a GPU; empty without those files."""
    if not RESULTS.is_dir():
        return {}
    seen = {(run.op, run.backend) for run in runs()}
    kernels = {"triton": triton_ops, "cuda": CUDA_OPS}
    missing = {backend: [op for op in ops if (op, backend) not in seen] for backend, ops in kernels.items()}
    return {backend: ops for backend, ops in missing.items() if ops}


def defaults():
    """{op: (backend, file)}: which backend measured faster on a GPU, and where; an op not measured is not in it."""
    measured = json.loads(DEFAULTS.read_text(encoding="utf-8"))
    return {op: (entry["backend"], entry["measured"]) for op, entry in measured.items()}
