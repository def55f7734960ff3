"""The compiled part: what each unit contains, how one is chosen, and that the package does without it."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from lockin_fast import dispatch

ROOT = Path(__file__).resolve().parents[1]
OBJECTS = sorted(ROOT.glob("build/cmake-*/CMakeFiles"))
X86 = torch.backends.cpu.get_cpu_capability() != "NEON" and os.uname().machine in ("x86_64", "AMD64")
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
TOOL = {
    name: shutil.which(name, path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    for name in ("cmake", "ninja")
}

needs_objects = pytest.mark.skipif(
    not (X86 and OBJECTS and shutil.which("objdump") and shutil.which("nm")),
    reason="needs the object files of an x86-64 build in build/, objdump and nm",
)


def objects(target):
    found = [path for folder in OBJECTS for path in (folder / f"{target}.dir").rglob("*.o")]
    assert found, f"no object files of {target}"
    return found


def disassembly(target):
    command = ["objdump", "-d", "--no-show-raw-insn", *map(str, objects(target))]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(text):
    """(mnemonic, operands) of every instruction line."""
    return re.findall(r"^\s+[0-9a-f]+:\s+(?:rep\w* |lock |notrack |bnd )*(\S+) *(.*)$", text, flags=re.MULTILINE)


def wide(text):
    """Instructions that need AVX: wide registers, or the three-operand forms on narrow ones."""
    return [
        (name, operands)
        for name, operands in instructions(text)
        if re.search(r"%[yz]mm|%k[0-7]", operands) or (name.startswith("v") and "%xmm" in operands)
    ]


@needs_objects
@pytest.mark.parametrize("target", ["unit_baseline", "lockin_fast_cpu", "_native"])
def test_what_every_processor_runs_holds_no_avx(target):
    assert wide(disassembly(target)) == []


@needs_objects
@pytest.mark.parametrize(
    "unit, has, lacks",
    [
        ("avx2", r"%ymm", r"%zmm|vdpbf16ps"),
        ("avx512", r"%zmm", r"vdpbf16ps"),
        ("avx512bf16", r"vdpbf16ps", r"%tmm"),
    ],
)
def test_each_unit_uses_its_own_instructions_only(unit, has, lacks):
    text = disassembly(f"unit_{unit}")
    assert wide(text)
    assert re.search(has, text)
    assert not re.search(lacks, text)


@needs_objects
@pytest.mark.parametrize("unit", ["baseline", "avx2", "avx512", "avx512bf16"])
def test_units_share_no_code_through_the_linker(unit):
    """A weak symbol would let the linker keep one unit's copy for all of them."""
    for path in objects(f"unit_{unit}"):
        listing = subprocess.run(["nm", "--defined-only", "-C", str(path)], capture_output=True, text=True, check=True)
        symbols = [line.split(maxsplit=2) for line in listing.stdout.splitlines()]
        assert [s for s in symbols if s[1] in "WVuC"] == []
        assert [s[2] for s in symbols if s[1] == "T" and not s[2].startswith(f"lockin_fast::{unit}::")] == []


def run_python(code, cwd=None, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LOCKIN_FAST_") and k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd or ROOT, env={**clean, **environment}
    )


OPS_AGAINST_REFERENCE = """
import torch
from lockin_fast import _native
from lockin_fast.ops import block_penalty, latent_backward
from lockin_fast.dispatch import backends
assert {row.backend for row in backends() if row.op == "block_penalty" and row.device == "cpu"} == {"cpu"}
print(_native.isa())
torch.manual_seed(0)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for tokens, width, latents in ((1, 1, 1), (37, 123, 13), (70, 2304, 20), (5, 48, 100)):
        h = torch.randn(tokens, width).to(dtype)
        h_ref = (h.float() + 0.5 * torch.randn(tokens, width)).to(dtype)
        weight = (torch.randn(latents, width) / width**0.5).to(dtype)
        bias, sign = torch.randn(latents) / 4, torch.where(torch.rand(latents) < 0.5, -1.0, 1.0)
        args = weight, bias, sign, None, h_ref, torch.rand(tokens) < 0.8, None, None, False
        exact = block_penalty.reference(h.double(), weight.double(), bias, sign, None, h_ref.double(), *args[5:])
        plain = block_penalty.reference(h, *args)
        got = torch.ops.lockin_fast.block_penalty(h, *args)
        for name, g, p, e in zip(("per_token", "coefficient"), got, plain, exact):
            limit = 2 * (p - e).abs().max() + 8 * 2.0**-23 * (1 + e.abs().max())
            assert (g - e).abs().max() <= limit, (name, dtype, tokens, (g - e).abs().max(), limit)
        scale = torch.rand(tokens)
        grads = torch.randn(tokens, width).to(dtype)
        plain = latent_backward.reference(got[1], scale, weight, grads)
        exact = latent_backward.reference(got[1].double(), scale.double(), weight.double(), grads.double())
        out = torch.ops.lockin_fast.latent_backward(got[1], scale, weight, grads)
        limit = 2 * (plain - exact).abs().max() + 8 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert (out - exact).abs().max() <= limit, ("backward", dtype, tokens)
        torch.set_num_threads(1)
        single = torch.ops.lockin_fast.block_penalty(h, *args)
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(single, torch.ops.lockin_fast.block_penalty(h, *args)))
        assert torch.ops.lockin_fast.block_penalty(h, *args[:4], h.clone(), *args[5:])[0].abs().max() == 0.0
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16"])
def test_each_level_serves_when_asked_for(isa):
    native = pytest.importorskip("lockin_fast._native", reason="the compiled part is not built")
    if isa not in native.cpu_features():
        pytest.skip(f"this processor has no {isa}")
    done = run_python(OPS_AGAINST_REFERENCE, LOCKIN_FAST_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [isa]


@pytest.mark.parametrize(
    "code",
    [
        "from lockin_fast import _native; _native.isa()",
        "import torch, lockin_fast as lf; lf.encode_latents(torch.ones(1, 4), torch.ones(2, 4), torch.zeros(2))",
    ],
)
def test_a_level_that_cannot_be_served_is_an_error(code):
    pytest.importorskip("lockin_fast._native", reason="the compiled part is not built")
    done = run_python(code, LOCKIN_FAST_CPU_ISA="sse9")
    assert done.returncode != 0
    assert "LOCKIN_FAST_CPU_ISA=sse9 cannot be served; this processor runs: baseline" in done.stderr


def copy_sources(target):
    """The package as a fresh clone has it: no compiled part."""
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, target)
    (target / "README.md").write_text("copy\n")
    shutil.copytree(ROOT / "csrc", target / "csrc")
    shutil.copytree(ROOT / "lockin_fast", target / "lockin_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return target


def test_the_package_works_with_nothing_compiled(tmp_path):
    copy_sources(tmp_path)
    code = """
import torch, lockin_fast
assert lockin_fast.__file__.startswith(%r), lockin_fast.__file__
h = torch.randn(3, 8, requires_grad=True)
penalty = lockin_fast.block_penalty(h, torch.randn(2, 8), torch.zeros(2), torch.ones(2), z_ref=torch.zeros(3, 2))
penalty.total.backward()
assert h.grad.isfinite().all()
row = next(row for row in lockin_fast.backends() if row.op == "block_penalty")
assert row.backend == "reference" and "compiled part is missing" in row.why, row
"""
    done = run_python(code % str(tmp_path), cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr


def build_in(folder, *command, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", *command], cwd=folder, capture_output=True, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_a_machine_without_a_compiler_is_told_so(tmp_path):
    copy_sources(tmp_path)
    (tmp_path / "bin").mkdir()
    done = build_in(tmp_path, "build_ext", "--inplace", PATH=str(tmp_path / "bin"), CXX="")
    assert done.returncode == 0, done.stderr
    assert "NOTHING WAS COMPILED: no C++ compiler was found" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.skipif(not (COMPILER and TOOL["cmake"] and TOOL["ninja"]), reason="needs a C++ compiler, cmake and ninja")
def test_without_python_headers_the_ops_are_built_all_the_same(tmp_path):
    (tmp_path / "patchlevel.h").write_text('#define PY_VERSION "2.0.0"\n')  # headers, but not of this Python
    done = subprocess.run(
        [
            TOOL["cmake"], "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={TOOL['ninja']}", f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DPython3_INCLUDE_DIR={tmp_path}", f"-DLOCKIN_FAST_TORCH_DIR={Path(torch.__file__).parent}",
            "-DLOCKIN_FAST_CUDA=0",
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rules = (tmp_path / "build" / "build.ninja").read_text()
    assert "liblockin_fast_cpu.so" in rules
    assert "native.cpp" not in rules
    assert "has no headers (Python.h)" in done.stderr


@pytest.mark.skipif(not dispatch.CPU_PART.exists(), reason="the compiled part is not built")
def test_the_ops_need_no_native_module():
    code = """
import sys
sys.modules["lockin_fast._native"] = None
import torch, lockin_fast
assert {row.backend for row in lockin_fast.backends() if row.op == "encode_latents" and row.device == "cpu"} == {"cpu"}
lockin_fast.encode_latents(torch.ones(1, 4), torch.ones(2, 4), torch.zeros(2))
"""
    done = run_python(code, LOCKIN_FAST_CPU_ISA="baseline")
    assert done.returncode == 0, done.stderr
    done = run_python(code, LOCKIN_FAST_CPU_ISA="sse9")
    assert "LOCKIN_FAST_CPU_ISA=sse9 cannot be served" in done.stderr


def test_the_build_can_be_skipped(tmp_path):
    copy_sources(tmp_path)
    done = build_in(tmp_path, "bdist_wheel", LOCKIN_FAST_NO_BUILD="1")
    assert done.returncode == 0, done.stderr
    assert "NOTHING WAS COMPILED: LOCKIN_FAST_NO_BUILD=1 is set" in done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "lockin_fast/dispatch.py" in names
    assert not [name for name in names if name.endswith(".so")]


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")
def test_a_wheel_made_from_the_source_distribution_carries_the_compiled_part(tmp_path):
    (tmp_path / "clone").mkdir()
    done = build_in(copy_sources(tmp_path / "clone"), "sdist")
    assert done.returncode == 0, done.stderr
    (archive,) = (tmp_path / "clone" / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path)
    source = tmp_path / archive.name.removesuffix(".tar.gz")
    done = build_in(source, "bdist_wheel")
    assert done.returncode == 0, done.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = "import lockin_fast as lf; print(lf.__file__); print({r.op: r.backend for r in lf.backends()})"
    done = run_python(code, cwd=tmp_path / "installed", PYTHONPATH=str(tmp_path / "installed"))
    assert str(tmp_path / "installed") in done.stdout and "'block_penalty': 'cpu'" in done.stdout, done.stderr
