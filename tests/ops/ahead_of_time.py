"""Triton launches compiled for chips that are not here: a launch is described by a call on tensors without memory."""

import re
import subprocess
from pathlib import Path
from unittest import mock

import torch
import triton
from sass import spills
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
STACK = 64  # bytes a thread may put away once, outside loops: 16 registers
SHARED_KB = {80: 163, 90: 227, 100: 227, 120: 99}
TENSOR_CORES = {80: "mma.sync", 90: "mma.sync|wgmma.mma_async", 100: "mma.sync|tcgen05.mma", 120: "mma.sync"}
POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.uint8: "*u8", torch.int8: "*i8",
    torch.bool: "*i1",
}  # fmt: skip


class Inputs:
    """Arguments of any shape, made as they are asked for: `x.h`, or `x.of(T, d, dtype=torch.uint8)`."""

    def __init__(self, dtype, latents, tokens=4096, width=4096):
        self.dtype, self.T, self.d, self.K = dtype, tokens, width, latents
        self.h, self.h_ref, self.grad = (self.of(tokens, width) for _ in range(3))
        self.weight = self.of(latents, width)
        fp32 = torch.float32
        self.bias, self.sign, self.threshold, self.margin = (self.of(latents, dtype=fp32) for _ in range(4))
        self.z_ref, self.coefficient = (self.of(tokens, latents, dtype=fp32) for _ in range(2))
        self.scale = self.of(tokens, dtype=fp32)
        self.mask = self.of(tokens, dtype=torch.bool)

    def of(self, *shape, dtype=None):
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")


def launches(call):
    """The launches `call` makes, as (kernel, arguments in order, launch options); nothing runs."""
    seen = []

    def record(kernel, *args, grid, warmup, **named):
        values = dict(zip(kernel.arg_names, args, strict=False))
        values |= {name: named.pop(name) for name in kernel.arg_names if name in named}
        seen.append((kernel, {name: values[name] for name in kernel.arg_names}, named))

    with mock.patch.object(JITFunction, "run", record):
        call()
    return seen


def compile_for(chip, kernel, values, options):
    """Compile as the launch would: absent arguments and ones are constants, multiples of 16 are known as such."""
    signature, constants, attributes = {}, {}, {}
    for parameter, (name, value) in zip(kernel.params, values.items(), strict=True):
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        aligned = True
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        elif isinstance(value, bool):
            signature[name], aligned = "u1", False
        elif isinstance(value, int):
            signature[name], aligned = "i32" if abs(value) < 2**31 else "i64", value % 16 == 0
        else:
            signature[name], aligned = "fp32", False
        if aligned:
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)


def resources(compiled, folder):
    """STACK and LOCAL bytes and registers of a compiled kernel, as the assembler recorded them."""
    text = read_binary(compiled, folder, "cuobjdump", "-res-usage")
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def read_binary(compiled, folder, tool, option):
    """What a tool of the CUDA toolkit prints about a compiled kernel."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    return subprocess.run([TOOLS / tool, option, binary], capture_output=True, text=True, check=True).stdout


def check(chip, dtype, call, folder, wanted=None):
    """Every kernel that `call` launches fits the chip, spills nothing in a loop and multiplies on tensor cores.

    A few registers put away before a loop and taken back behind it cost nothing: they are allowed and printed.

    `wanted` is what the code of the kernel that multiplies must contain besides, e.g. wgmma.mma_async.
    """
    distinct = {}
    for kernel, values, options in launches(call):
        shapes = tuple(v if not isinstance(v, torch.Tensor) else v.dtype for v in values.values())
        distinct[kernel, shapes] = kernel, values, options
    for kernel, values, options in distinct.values():
        compiled = compile_for(chip, kernel, values, options)
        used, ptx = resources(compiled, folder), compiled.asm["ptx"]
        label = f"{kernel.__name__} for sm_{chip}, {options}: {used}, {compiled.metadata.shared} bytes shared"
        print(label)
        assert used["LOCAL"] == 0 and ".local" not in ptx and used["STACK"] <= STACK, f"spills: {label}"
        if used["STACK"]:
            inside, outside = spills(read_binary(compiled, folder, "nvdisasm", "-c"))
            print(*outside, sep="\n")
            assert not inside, "\n".join([f"spills inside a loop: {label}", *inside])
        assert 0 < used["REG"] <= 255, label
        assert compiled.metadata.shared <= SHARED_KB[chip] * 1024, label
        if "tt.dot" in compiled.asm["ttir"] and dtype != torch.float32:
            assert re.search(TENSOR_CORES[chip], ptx), f"no tensor cores: {label}"
            assert not wanted or re.search(wanted, ptx), f"no {wanted}: {label}"
