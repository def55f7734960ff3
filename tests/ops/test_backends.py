"""Which kernel serves what, that it can be forced, and that every backend passes the tests of the ops."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import lockin_fast
import lockin_fast.ops  # defines the ops that the tests ask the dispatcher about
from lockin_fast import dispatch
from lockin_fast.kernels import gpu

HERE = Path(__file__).parent
OPS = Path(lockin_fast.__file__).parent / "ops"
WIDE = ["test_encode_topk.py", "test_latent_stats.py", "test_segment_stats.py"]
NARROW = sorted({f"test_{path.stem}.py" for path in OPS.glob("[a-z]*.py")} - set(WIDE))
OWN = (
    "LOCKIN_FAST_BACKEND", "LOCKIN_FAST_CPU_ISA", "LOCKIN_FAST_TEST_WITHOUT", "LOCKIN_FAST_TEST_DEVICE",
    "LOCKIN_FAST_TEST_EMULATED", "TRITON_INTERPRET",
)  # fmt: skip


def environment(**changes):
    """This environment with the package's own switches as given; one thread, so that runs do not fight over cores."""
    return {k: v for k, v in os.environ.items() if k not in OWN} | {"OMP_NUM_THREADS": "1"} | changes


def python(code, **changes):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(**changes))


def served(**changes):
    """op -> backend on the CPU, in a process with these switches."""
    code = "import lockin_fast\nfor r in lockin_fast.backends():\n  if r.device == 'cpu': print(r.op, r.backend)"
    run = python(code, **changes)
    assert run.returncode == 0, run.stderr
    return dict(line.split() for line in run.stdout.splitlines())


needs_compiled = pytest.mark.skipif(not dispatch.CPU_PART.exists(), reason="the compiled part is not built")
needs_triton = pytest.mark.skipif(dispatch._triton_missing() is not None, reason="triton is not installed")
nested = pytest.mark.skipif(any(name in os.environ for name in OWN), reason="this run is of one backend already")


@needs_compiled
def test_the_compiled_part_serves_the_narrow_ops():
    narrow = dict.fromkeys(("block_penalty", "encode_latents", "latent_backward", "latent_backward_"), "cpu")
    full_width = ("encode_topk", "latent_stats", "segment_stats")
    assert served(LOCKIN_FAST_CPU_ISA="baseline").items() >= (narrow | dict.fromkeys(full_width, "reference")).items()
    wide = "cpu" if "avx512" in import_module("lockin_fast._native").cpu_features() else "reference"
    expected = narrow | dict.fromkeys(full_width, wide)
    assert served(LOCKIN_FAST_CPU_ISA="").items() >= expected.items()
    assert served(LOCKIN_FAST_BACKEND="cpu", TRITON_INTERPRET="1") == served()


@needs_compiled
def test_the_report_says_why_the_compiled_part_lacks_an_op():
    code = """
import lockin_fast
from lockin_fast import dispatch
has = dispatch._has_cpu_kernel
dispatch._has_cpu_kernel = lambda op: op != "patch_" and has(op)  # as in a library built before there was patch_
why = {r.op: (r.backend, r.why) for r in lockin_fast.backends() if r.device == "cpu"}
assert why["patch_"] == ("reference", "the compiled part lacks it: build it again"), why["patch_"]
assert why["latent_stats"] == why["encode_topk"]
assert why["latent_stats"] == ("reference", "stock torch matrix products over tiles are as fast below AVX-512")
"""
    run = python(code, LOCKIN_FAST_CPU_ISA="baseline")
    assert run.returncode == 0, run.stderr


def test_the_reference_can_be_forced():
    assert set(served(LOCKIN_FAST_BACKEND="reference").values()) == {"reference"}


@needs_triton
def test_the_interpreter_serves_every_op():
    expected = dict.fromkeys(dispatch.triton_ops(), "triton")
    expected["segment_stats"] = "reference"  # which calls latent_stats
    assert served(TRITON_INTERPRET="1") == expected
    assert served(TRITON_INTERPRET="1", LOCKIN_FAST_BACKEND="triton") == expected


@pytest.mark.parametrize(
    ("backend", "error"),
    [
        ("fastest", "LOCKIN_FAST_BACKEND is 'fastest'; expected one of reference, cpu, triton, cuda"),
        pytest.param(
            "cuda",
            "LOCKIN_FAST_BACKEND=cuda, but this torch is not built for CUDA",
            marks=pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA"),
        ),
    ],
)
def test_an_unavailable_backend_raises(backend, error):
    run = python("import lockin_fast.ops", LOCKIN_FAST_BACKEND=backend)
    assert run.returncode != 0 and error in run.stderr


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_triton_without_a_device_raises():
    run = python("import lockin_fast.ops", LOCKIN_FAST_BACKEND="triton")
    assert run.returncode != 0 and "there is no CUDA device; set TRITON_INTERPRET=1" in run.stderr


def test_forcing_a_missing_compiled_part_raises():
    code = "from pathlib import Path\nfrom lockin_fast import dispatch\ndispatch.CPU_PART = Path('nowhere.so')\n"
    run = python(code + "import lockin_fast.ops", LOCKIN_FAST_BACKEND="cpu")
    assert run.returncode != 0 and "LOCKIN_FAST_BACKEND=cpu, but the compiled part is missing" in run.stderr
    run = python(code + "import lockin_fast\nprint(lockin_fast.backends())")
    assert run.returncode == 0 and "the compiled part is missing" in run.stdout


def test_a_compiled_part_that_does_not_load_is_reported(tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a shared object")
    code = f"from pathlib import Path\nfrom lockin_fast import dispatch\ndispatch.CPU_PART = Path({str(broken)!r})\n"
    run = python(code + "import lockin_fast\nprint(lockin_fast.backends())")
    assert run.returncode == 0, run.stderr
    assert "the compiled part does not load" in run.stdout


@needs_triton
def test_fallbacks_are_counted_with_their_reason():
    code = """
import torch, lockin_fast
h = torch.zeros(4, 8, dtype=torch.bfloat16)
for _ in range(3):
    lockin_fast.encode_latents(h, torch.zeros(2, 8), torch.zeros(2))
report = lockin_fast.backends()
row = next(r for r in report if r.op == "encode_latents" and r.device == "cpu")
assert row.fallbacks == {"bfloat16 is silently wrong in triton's interpreter": 3}, row
assert "3 calls fell back" in str(report)
"""
    run = python(code, TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stderr


WIDE_ENCODE = """
import torch, lockin_fast
from lockin_fast.ops import encode_latents as module
taken = []
module.wide = lambda *args, wide=module.wide: taken.append(1) or wide(*args)
lockin_fast.encode_latents(torch.ones(1, 1025), torch.ones(4096, 1025), torch.zeros(4096))
row = next(r for r in lockin_fast.backends() if r.op == "encode_latents" and r.device == "cpu")
print(len(taken), row.backend, "weights over 16 MB go to stock torch" in row.why)
"""


@pytest.mark.parametrize(
    ("backend", "taken"),
    [pytest.param("", "1 cpu True", marks=needs_compiled), pytest.param("cpu", "0 cpu False", marks=needs_compiled),
     ("reference", "0 reference False")],
)  # fmt: skip
def test_a_wide_encode_goes_to_stock_torch_and_says_so_unless_a_backend_is_forced(backend, taken):
    run = python(WIDE_ENCODE, LOCKIN_FAST_BACKEND=backend)
    assert run.stdout.strip() == taken, run.stderr


# A process that takes itself for one on a GPU machine. Loading and registering the CUDA part needs no GPU.
PRETEND = """
import json, os, sys, torch
from pathlib import Path
from lockin_fast import dispatch
from lockin_fast.kernels import gpu
torch.version.cuda, torch.cuda.is_available = "13.0", lambda: True
gpu.DEFAULTS = Path(os.environ["DEFAULTS"])
if part := os.environ.get("PART"):
    dispatch.CUDA_PART = Path(part)
import lockin_fast
rows = {r.op: r for r in lockin_fast.backends() if r.device == "cuda"}
registered = [op for op in rows if torch._C._dispatch_has_kernel_for_dispatch_key("lockin_fast::" + op, "CUDA")]
print(json.dumps({"rows": {op: [r.backend, r.why] for op, r in rows.items()}, "registered": registered}))
"""
needs_cuda_part = pytest.mark.skipif(
    not (dispatch.CUDA_PART.exists() and gpu.CUDA_OPS), reason="the CUDA part is not built: nvcc is absent"
)


def on_a_gpu_machine(tmp_path, measured=None, **changes):
    """op -> (backend, why) on the device cuda, where `measured` is what gpu_defaults.json holds."""
    defaults = tmp_path / "gpu_defaults.json"
    defaults.write_text(json.dumps(measured or {}))
    run = python(PRETEND, DEFAULTS=str(defaults), **changes)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert set(found["registered"]) == {op for op, (backend, _) in found["rows"].items() if backend != "reference"}
    return found["rows"]


def test_a_gpu_is_served_by_triton_until_measured(tmp_path):
    triton = [] if dispatch._triton_missing() else dispatch.triton_ops()
    for op, (backend, why) in on_a_gpu_machine(tmp_path).items():
        if op in triton:
            # What is left to stock torch may follow.
            assert backend == "triton" and why.startswith("triton is installed, and no measurement prefers another")
        elif op not in gpu.CUDA_OPS:
            assert backend == "reference"


@needs_triton
@needs_cuda_part
def test_a_gpu_is_served_by_what_measured_faster(tmp_path):
    cuda, triton = gpu.CUDA_OPS[0], "encode_latents"
    measured = {
        cuda: {"backend": "cuda", "measured": "gpu_a.csv"},
        triton: {"backend": "triton", "measured": "gpu_b.csv"},
    }
    rows = on_a_gpu_machine(tmp_path, measured)
    assert rows[cuda] == ["cuda", "measured faster on a GPU (gpu_a.csv)"]
    assert rows[triton] == ["triton", "measured faster on a GPU (gpu_b.csv)"]
    assert {rows[op][0] for op in dispatch.triton_ops() if op != cuda} == {"triton"}

    rows = on_a_gpu_machine(tmp_path, measured, PART="nowhere.so")
    assert rows[cuda][0] == ("triton" if cuda in dispatch.triton_ops() else "reference")
    assert rows[cuda][1].startswith("cuda measured faster (gpu_a.csv), but the CUDA part is missing")

    rows = on_a_gpu_machine(tmp_path, measured, LOCKIN_FAST_BACKEND="triton")
    assert rows[triton] == ["triton", "LOCKIN_FAST_BACKEND=triton"]
    assert not any(backend == "cuda" for backend, _ in rows.values())


@needs_cuda_part
def test_cuda_can_be_forced_and_says_which_ops_have_no_kernel(tmp_path):
    rows = on_a_gpu_machine(tmp_path, LOCKIN_FAST_BACKEND="cuda")
    for op in gpu.CUDA_OPS:
        backend, why = rows[op]
        assert backend == "cuda" and why.split("; ")[0] == "LOCKIN_FAST_BACKEND=cuda"
    assert rows["encode_latents"][1] == "LOCKIN_FAST_BACKEND=cuda, which has no kernel for it"
    assert {backend for backend, _ in on_a_gpu_machine(tmp_path, LOCKIN_FAST_BACKEND="cpu").values()} == {"reference"}


def test_forcing_cuda_where_it_is_missing_raises(tmp_path):
    code = "import torch; torch.version.cuda, torch.cuda.is_available = '13.0', lambda: {device}\n"
    code += "from pathlib import Path\nfrom lockin_fast import dispatch\ndispatch.CUDA_PART = Path('nowhere.so')\n"
    for device, error in ((False, "there is no CUDA device"), (True, "the CUDA part is missing: build it with nvcc")):
        run = python(code.format(device=device) + "import lockin_fast.ops", LOCKIN_FAST_BACKEND="cuda")
        assert run.returncode != 0 and f"LOCKIN_FAST_BACKEND=cuda, but {error}" in run.stderr


def test_the_report_names_the_kernels_that_never_ran_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "CUDA_OPS", ("patch_", "steer_"))
    never = {"triton": dispatch.triton_ops(), "cuda": list(gpu.CUDA_OPS)}
    assert dispatch.never_run_on_gpu() == never
    assert f"never run on a GPU, in cuda: {', '.join(gpu.CUDA_OPS)}" in str(lockin_fast.backends())
    rows = [f"{op},cuda,H100,1.0,abc" for op in gpu.CUDA_OPS] + ["encode_latents,triton,H100,1.0,abc"]
    (tmp_path / "gpu_h100.csv").write_text("\n".join(["op,backend,gpu,median_ms,commit", *rows]))
    never["triton"].remove("encode_latents")
    assert dispatch.never_run_on_gpu() == {"triton": never["triton"]}
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "nowhere")
    assert dispatch.never_run_on_gpu() == {}


def test_the_measured_defaults_name_known_ops_and_files():
    for op, (backend, file) in gpu.defaults().items():
        assert op in dispatch._references and backend in ("triton", "cuda")
        assert (gpu.RESULTS / file).exists(), f"{op}: {file}"


def test_the_report_covers_every_op_here():
    rows = lockin_fast.backends()
    assert {row.op for row in rows if row.device == "cpu"} == set(dispatch._references)
    assert all(row.backend in dispatch.BACKENDS and row.why for row in rows)


def passes(files, but="scratch", **changes):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", f"not ({but})"]
    run = subprocess.run(
        [*command, *(str(HERE / name) for name in files)], capture_output=True, text=True, env=environment(**changes)
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


@pytest.mark.slow  # what it serves is forced in another slow test, and each op has a test without its kernel
@nested
def test_every_op_passes_with_neither_compiled_part_nor_triton():
    passes([*NARROW, *WIDE], LOCKIN_FAST_TEST_WITHOUT="compiled,triton")


@nested
@needs_triton
def test_every_op_passes_in_the_interpreter():
    # Interpreted loops over wide rows or many tiles are slow; a test of their own runs those, and 16-bit operands.
    slow = "2304 or 4096 or float16 or many_tokens or decoded_self or tiles_and_parts"
    passes([*NARROW, *WIDE], but=f"scratch or {slow}", TRITON_INTERPRET="1")


@nested
@needs_triton
@pytest.mark.slow
def test_every_op_passes_in_the_interpreter_at_full_width():
    passes([*NARROW, *WIDE], TRITON_INTERPRET="1")


@nested
@needs_compiled
@pytest.mark.parametrize(
    "isa",
    [
        pytest.param("baseline", marks=pytest.mark.slow),
        "avx2",
        pytest.param("avx512", marks=pytest.mark.slow),
        pytest.param("avx512bf16", marks=pytest.mark.slow),
    ],
)
def test_every_op_passes_on_each_instruction_set(isa):
    from lockin_fast import _native

    if isa not in _native.cpu_features():
        pytest.skip(f"this CPU has no {isa}")
    if isa == _native.isa():
        pytest.skip(f"{isa} is what the tests around this one run on")
    check = python("from lockin_fast import _native; print(_native.isa())", LOCKIN_FAST_CPU_ISA=isa)
    assert check.stdout.strip() == isa, check.stderr
    passes([*NARROW, *WIDE] if isa.startswith("avx512") else NARROW, LOCKIN_FAST_CPU_ISA=isa)


@nested
@pytest.mark.slow
def test_every_op_passes_with_the_reference_forced():
    passes([*NARROW, *WIDE], LOCKIN_FAST_BACKEND="reference")
