"""The CUDA part as it is built: for which chips, with which resources, and that nothing loads it without a GPU."""

import csv
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from lockin_fast import dispatch
from lockin_fast.kernels import gpu

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
BUILDS = sorted(ROOT.glob("build/cmake-*/csrc/cuda/resources.csv"))
CHIPS = {"sm_80", "sm_90", "sm_100"}
SHARED_BYTES = 48 * 1024  # more must be asked for at the launch
NVCC = next(filter(None, map(shutil.which, ("nvcc", "/usr/local/cuda/bin/nvcc"))), None)
CMAKE, NINJA = (
    shutil.which(tool, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") for tool in ("cmake", "ninja")
)

needs_part = pytest.mark.skipif(
    not dispatch.CUDA_PART.exists(), reason="the CUDA part is not built: nvcc was absent in the build"
)


def resources(path):
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def run_python(code, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LOCKIN_FAST_")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**clean, **environment})


def test_the_report_covers_every_kernel_on_every_chip():
    kernels = {
        name
        for path in SOURCES.glob("*.cu")
        for name in re.findall(r"__global__[^(]*\([^)]*\) (\w+)\(", path.read_text())
    }
    chips = {}
    for row in resources(SOURCES / "resources.csv"):
        chips.setdefault(row["kernel"], set()).add(row["chip"])
    assert {name.partition("<")[0] for name in chips} == kernels and kernels
    assert all(of_kernel == CHIPS for of_kernel in chips.values()), chips


def test_no_kernel_spills_or_asks_for_too_much():
    for row in resources(SOURCES / "resources.csv"):
        assert row["stack"] == row["spill_stores"] == row["spill_loads"] == "0", row
        assert 0 < int(row["registers"]) <= 255 and int(row["shared"]) <= SHARED_BYTES, row


@pytest.mark.skipif(not BUILDS, reason="the CUDA part was not built here")
@pytest.mark.parametrize("table", BUILDS, ids=lambda path: path.parents[2].name)
def test_the_kept_report_is_that_of_the_build(table):
    kept, built = resources(SOURCES / "resources.csv"), resources(table)
    if {row["nvcc"] for row in built} != {row["nvcc"] for row in kept}:
        pytest.skip("the kept report is of another nvcc")
    if {row["chip"] for row in built} != CHIPS:
        pytest.skip("this build is for other chips")
    assert built == kept, f"kernels changed: cp {table} {SOURCES}/resources.csv"


FAKE_COMPILER = """#!/bin/sh
echo "ptxas info    : Compiling entry function '_Z6kernelv' for 'sm_90'" >&2
echo "ptxas info    : Function properties for _Z6kernelv" >&2
echo "    {stack} bytes stack frame, {spills} bytes spill stores, {spills} bytes spill loads" >&2
echo "ptxas info    : Used 255 registers, used 1 barriers, 64 bytes smem" >&2
echo "a warning of its own" >&2
touch "$2"
exit {status}
"""


def compile_with(folder, stack=0, spills=0, status=0):
    """Run the build's compile step with a compiler that reports this; the process and the object's path."""
    compiler, target = folder / "compiler", folder / "kernel.o"
    compiler.write_text(FAKE_COMPILER.format(stack=stack, spills=spills, status=status))
    compiler.chmod(0o755)
    command = [sys.executable, SOURCES / "resources.py", "compile", compiler, "-o", target]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True), target


@pytest.mark.parametrize(("stack", "spills"), [(8, 8), (64, 0), (0, 4)])
def test_a_kernel_that_spills_fails_the_build(tmp_path, stack, spills):
    done, target = compile_with(tmp_path, stack, spills)
    assert done.returncode == 1 and "kernel spills to local memory on sm_90" in done.stderr
    assert not target.exists()


def test_the_compile_step_keeps_the_report_and_passes_the_rest_on(tmp_path):
    done, target = compile_with(tmp_path)
    assert done.returncode == 0 and done.stderr == "a warning of its own\n" and target.exists()
    table = tmp_path / "resources.csv"
    gather = [sys.executable, SOURCES / "resources.py", "gather", table, "13.0", target]
    subprocess.run(list(map(str, gather)), check=True)
    (row,) = resources(table)
    assert row == {
        "kernel": "kernel", "chip": "sm_90", "registers": "255", "shared": "64", "stack": "0", "spill_stores": "0",
        "spill_loads": "0", "nvcc": "13.0",
    }  # fmt: skip
    assert compile_with(tmp_path, status=3)[0].returncode == 3


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_nvcc_and_the_compile_step_agree_on_a_spill(tmp_path):
    source = tmp_path / "spills.cu"
    source.write_text("""
__global__ void spills(const int* places, float* out) {
  float kept[64];
  for (int i = 0; i < 64; ++i) kept[i] = out[i];
  for (int i = 0; i < 64; ++i) out[i] = kept[places[i] % 64];
}
""")
    command = [sys.executable, SOURCES / "resources.py", "compile", NVCC, "-Xptxas", "-v", "-arch=sm_90", "-c", source]
    done = subprocess.run([*map(str, command), "-o", str(tmp_path / "spills.o")], capture_output=True, text=True)
    assert done.returncode == 1 and "spills spills to local memory on sm_90" in done.stderr, done.stderr


def test_no_torch_in_the_kernels():
    for path in (*SOURCES.glob("*.cu"), *SOURCES.glob("*.h"), *(ROOT / "csrc" / "common").glob("*.h")):
        for header in re.findall(r"#include [<\"](.*)[>\"]", path.read_text()):
            assert not header.startswith(("torch", "ATen", "c10", "../ops")), f"{path.name} includes {header}"


@needs_part
def test_the_library_registers_the_ops_it_is_asked_for():
    code = """
import torch
from lockin_fast import dispatch
torch.ops.load_library(str(dispatch.CUDA_PART))
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("lockin_fast::")}
print(*sorted(name.partition("::")[2] for name in names if has_kernel(name, "CUDA")))
"""
    for asked, registered in (("patch_", ["patch_"]), ("steer_,patch_diff", ["patch_diff", "steer_"]), ("", [])):
        done = run_python(code, LOCKIN_FAST_CUDA_OPS=asked)
        assert done.stdout.split() == registered, done.stderr
    import_module("lockin_fast.ops")
    assert [op for op in run_python(code).stdout.split() if op in dispatch._references] == sorted(gpu.CUDA_OPS)


@needs_part
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_machine_without_a_gpu_does_not_load_it():
    code = "import lockin_fast.ops\nprint(open('/proc/self/maps').read())"
    done = run_python(code)
    assert "liblockin_fast_c" in done.stdout and "liblockin_fast_cuda" not in done.stdout, done.stderr


@needs_part
@pytest.mark.skipif(shutil.which("nm") is None or shutil.which("readelf") is None, reason="needs nm and readelf")
def test_the_library_shows_and_needs_nothing_of_cuda():
    """The runtime inside must not meet torch's own, and a CPU build of torch must be able to load the library."""
    symbols = subprocess.run(["nm", "-D", dispatch.CUDA_PART], capture_output=True, text=True, check=True).stdout
    assert not re.findall(r" [TDBWV] (cuda\w*|__cuda\w*|lockin\w*|\w*lockin_fast\w*)$", symbols, flags=re.MULTILINE)
    assert not re.findall(r" U (?:cu|__cuda)\w*$", symbols, flags=re.MULTILINE)
    needed = subprocess.run(["readelf", "-d", dispatch.CUDA_PART], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in needed and not re.search(r"NEEDED.*(cudart|libcuda|torch_cuda|c10)", needed)


@pytest.mark.skipif(not (CMAKE and NINJA), reason="needs cmake and ninja")
@pytest.mark.parametrize("wanted", ["auto", "1"])
def test_without_nvcc_the_part_is_left_out_unless_insisted_on(tmp_path, wanted):
    done = subprocess.run(
        [
            CMAKE, "-S", ROOT, "-B", tmp_path, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={NINJA}",
            f"-DPython3_EXECUTABLE={sys.executable}", f"-DPYTHON_EXECUTABLE={sys.executable}",
            f"-DLOCKIN_FAST_TORCH_DIR={Path(torch.__file__).parent}", f"-DLOCKIN_FAST_CUDA={wanted}",
        ],
        capture_output=True, text=True, env=os.environ | {"CUDACXX": str(tmp_path / "no-nvcc")},
    )  # fmt: skip
    if wanted == "1":
        assert done.returncode != 0 and "LOCKIN_FAST_CUDA=1, but no working nvcc was found" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert "CUDA kernels: not built, no working nvcc was found" in done.stdout
        assert "lockin_fast_cuda" not in (tmp_path / "build.ninja").read_text()
