"""The Triton kernels compiled for chips not here: no spills in loops, shared memory within the chip, tensor cores."""

from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from ahead_of_time import SHARED_KB, Inputs, check  # noqa: E402

from lockin_fast.kernels.triton import _configs, _tiles  # noqa: E402

pytestmark = pytest.mark.skipif(_tiles.INTERPRETING, reason="kernels are interpreted in this run, not compiled")


def kernels(file):
    return import_module(f"lockin_fast.kernels.triton.{file}")


def nf4_operands(x):
    """codes, absmax, channels and outliers of hidden states like x.h, in blocks of 64."""
    codes, absmax = x.of(x.T, x.d // 2, dtype=torch.uint8), x.of(x.T, x.d // 64, dtype=torch.float32)
    return codes, absmax, x.of(4, dtype=torch.int32), x.of(x.T, 4)


# One line a launch: "<file> <which>": the module and the inputs to a call of it.
LAUNCHES = {
    "encode_latents": lambda m, x: m.encode_latents(x.h, x.weight, x.bias, x.threshold),
    "encode_latents wide": lambda m, x: m.encode_latents(x.h, x.of(3000, x.d), x.of(3000, dtype=torch.float32), None),
    "encode_topk": lambda m, x: m.encode_topk(x.h, x.of(8192, x.d), x.of(8192, dtype=torch.float32), None, 64),
    "block_penalty h_ref": lambda m, x: m.block_penalty(
        x.h, x.weight, x.bias, x.sign, None, x.h_ref, x.mask, x.threshold, x.margin, False
    ),
    "block_penalty z_ref": lambda m, x: m.block_penalty(
        x.h, x.weight, x.bias, x.sign, x.z_ref, None, None, None, x.margin, True
    ),
    "block_penalty_nf4": lambda m, x: m.block_penalty_nf4(
        x.h, x.weight, x.bias, x.sign, *nf4_operands(x), x.mask, x.threshold, x.margin, False, 64
    ),
    "latent_backward": lambda m, x: m.latent_backward(x.coefficient, x.scale, x.weight, x.grad),
    "latent_backward in place": lambda m, x: m.latent_backward_(x.grad, x.coefficient, x.scale, x.weight),
    "latent_stats difference": lambda m, x: m.latent_stats(x.h, x.weight, x.bias, x.h_ref, x.threshold, x.mask),
    "latent_stats one stream": lambda m, x: m.latent_stats(x.h, x.weight, x.bias, None, None, None),
    "js_divergence": lambda m, x: m.js_divergence(x.of(8, 64, 128256), None),
    "nf4 quantize": lambda m, x: m.nf4_quantize(x.h, 64, x.of(4, dtype=torch.int32)),
    "nf4 dequantize": lambda m, x: m.nf4_dequantize(*nf4_operands(x), 64, x.dtype),
    "patch": lambda m, x: m.patch_(x.h, x.of(x.T, dtype=torch.int64), x.h_ref),
    "patch from NF4": lambda m, x: m.patch_nf4_(
        x.h,
        x.of(x.T, dtype=torch.int64),
        x.of(x.T, x.d // 2, dtype=torch.uint8),
        x.of(x.T, x.d // 64, dtype=torch.float32),
        x.of(8, dtype=torch.int32),
        x.of(x.T, 8),
        64,
    ),
    "patch_diff": lambda m, x: m.patch_diff(x.h, x.of(x.T, dtype=torch.int64), x.h_ref, x.weight, x.bias, x.threshold),
    "prefix_matching": lambda m, x: m.prefix_matching(
        x.of(2, 16, 256, 128), x.of(2, 8, 256, 128), x.of(2, 256, dtype=torch.int64), 0.125
    ),
    "prefix_matching wide": lambda m, x: m.prefix_matching(
        x.of(2, 16, 256, 200), x.of(2, 8, 256, 200), x.of(2, 256, dtype=torch.int64), 0.125
    ),
    "routing_stats": lambda m, x: m.routing_stats(x.of(x.T, 64), x.of(x.T, dtype=torch.int64), x.mask, 5, 8, True),
    "steer": lambda m, x: m.steer_(
        x.h.view(64, -1, x.d), x.weight, x.of(64, dtype=torch.int64), x.of(64, dtype=torch.float32)
    ),
}


PROCESSORS = {80: 108, 90: 132, 100: 148, 120: 170}
# What the products of a whole SAE have to run on, where there is more than mma.sync.
WIDE = "encode_latents wide", "encode_topk", "latent_stats"
FASTEST = {90: "wgmma.mma_async", 100: "tcgen05.mma"}


def compiles(name, chip, dtype, latents, folder):
    module, inputs = kernels(name.split()[0]), Inputs(dtype, latents)
    wide = name.startswith(WIDE) and dtype != torch.float32
    with mock.patch.object(_configs, "chip", lambda device: _configs.Chip(chip, PROCESSORS[chip])):
        check(chip, dtype, lambda: LAUNCHES[name](module, inputs), folder, FASTEST.get(chip) if wide else None)


def test_every_file_of_kernels_is_here():
    files = {path.stem for path in Path(_tiles.__file__).parent.glob("[a-z]*.py")}
    assert files == {name.split()[0] for name in LAUNCHES}


@pytest.mark.parametrize("chip", [80, 90, 120])
@pytest.mark.parametrize("name", LAUNCHES)
def test_compiles(name, chip, tmp_path):
    compiles(name, chip, torch.bfloat16, 20, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("latents", [1, 20, 100, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chip", SHARED_KB)
@pytest.mark.parametrize("name", LAUNCHES)
def test_compiles_for_every_chip_dtype_and_width(name, chip, dtype, latents, tmp_path):
    compiles(name, chip, dtype, latents, tmp_path)
