"""The Triton kernels compiled for chips that are not here: no spills, shared memory within the chip, tensor cores."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from lockin_fast.kernels.triton import (  # noqa: E402
    _tiles,
    block_penalty,
    encode_latents,
    latent_backward,
    latent_stats,
)

pytestmark = pytest.mark.skipif(_tiles.INTERPRETING, reason="kernels are interpreted in this run, not compiled")

SHARED_KB = {80: 163, 90: 227, 100: 227, 120: 99}
TENSOR_CORES = {80: "mma.sync", 90: "mma.sync|wgmma.mma_async", 100: "mma.sync|tcgen05.mma", 120: "mma.sync"}
NAMES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
SIXTEEN_BIT = "h", "h_ref", "weight", "grad", "out"
STRIDES = "h_stride", "h_ref_stride", "grad_stride", "out_stride", "D"
OTHERS = {
    "mask": "*u8", "active": "*i32", "sums": "*fp64", "squares": "*fp64", "counts": "*i64", "counts_ref": "*i64",
    "share": "fp32", "T": "i32", "K": "i32", "tiles": "i32", "scale_stride": "i32",
}  # fmt: skip


def variants(dtype, latents):
    """(kernel, module, constants, arguments that are None)."""
    narrow = _tiles.tile_sizes(4096, latents, dtype)
    backward = latent_backward.sizes(4096, latents, dtype)
    return {
        "encode_latents": (encode_latents.encode_kernel, encode_latents, narrow, ()),
        "block_penalty h_ref": (block_penalty.penalty_kernel, block_penalty, narrow, ("z_ref",)),
        "block_penalty z_ref": (block_penalty.penalty_kernel, block_penalty, narrow, ("h_ref", "threshold", "mask")),
        "latent_backward": (latent_backward.backward_kernel, latent_backward, backward | {"IN_PLACE": False}, ()),
        "latent_backward_": (latent_backward.backward_kernel, latent_backward, backward | {"IN_PLACE": True}, ()),
        "latent_stats": (latent_stats.stats_kernel, latent_stats, latent_stats.sizes(dtype), ()),
    }


def compile_for(chip, dtype, kernel, module, constants, absent):
    signature, aligned, constants = {}, {}, dict(constants)
    for i, name in enumerate(kernel.arg_names):
        if name in constants or name in absent:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
            continue
        own = NAMES[dtype] if name in SIXTEEN_BIT and (name, module) != ("out", encode_latents) else "*fp32"
        signature[name] = "i32" if name in STRIDES else OTHERS.get(name, own)
        if name in STRIDES or signature[name].startswith("*"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=module.LAUNCH)


def resources(compiled, folder):
    """STACK and LOCAL bytes and registers of a compiled kernel, as the assembler recorded them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    text = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def check(chip, dtype, latents, folder):
    for name, variant in variants(dtype, latents).items():
        compiled = compile_for(chip, dtype, *variant)
        label = f"{name} for sm_{chip}, {dtype}, {latents} latents"
        used = resources(compiled, folder)
        assert used["STACK"] == used["LOCAL"] == 0 and ".local" not in compiled.asm["ptx"], f"{label}: spills, {used}"
        assert 0 < used["REG"] <= 255, f"{label}: {used}"
        assert compiled.metadata.shared <= SHARED_KB[chip] * 1024, f"{label}: {compiled.metadata.shared} bytes shared"
        if dtype != torch.float32:
            assert re.search(TENSOR_CORES[chip], compiled.asm["ptx"]), f"{label}: no tensor cores"


@pytest.mark.parametrize("chip", SHARED_KB)
def test_compiles_for_every_chip(chip, tmp_path):
    check(chip, torch.bfloat16, 20, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("latents", [1, 13, 100, 300])
@pytest.mark.parametrize("dtype", NAMES, ids=str)
@pytest.mark.parametrize("chip", SHARED_KB)
def test_compiles_for_every_chip_dtype_and_width(chip, dtype, latents, tmp_path):
    check(chip, dtype, latents, tmp_path)
