"""Which kernel serves what, that it can be forced, and that every backend passes the tests of the ops."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import lockin_fast
from lockin_fast import dispatch

HERE = Path(__file__).parent
OPS = Path(lockin_fast.__file__).parent / "ops"
WIDE = ["test_encode_topk.py", "test_latent_stats.py"]
NARROW = sorted({f"test_{path.stem}.py" for path in OPS.glob("[a-z]*.py")} - set(WIDE))
OWN = ("LOCKIN_FAST_BACKEND", "LOCKIN_FAST_CPU_ISA", "LOCKIN_FAST_TEST_WITHOUT", "TRITON_INTERPRET")


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
    full_width = ("encode_topk", "latent_stats")
    assert served(LOCKIN_FAST_CPU_ISA="baseline").items() >= (narrow | dict.fromkeys(full_width, "reference")).items()
    wide = "cpu" if "avx512" in import_module("lockin_fast._native").cpu_features() else "reference"
    expected = narrow | {"encode_topk": "reference", "latent_stats": wide}
    assert served(LOCKIN_FAST_CPU_ISA="").items() >= expected.items()
    assert served(LOCKIN_FAST_BACKEND="cpu", TRITON_INTERPRET="1") == served()


def test_the_reference_can_be_forced():
    assert set(served(LOCKIN_FAST_BACKEND="reference").values()) == {"reference"}


@needs_triton
def test_the_interpreter_serves_every_op():
    assert served(TRITON_INTERPRET="1") == dict.fromkeys(dispatch.triton_ops(), "triton")
    assert served(TRITON_INTERPRET="1", LOCKIN_FAST_BACKEND="triton") == dict.fromkeys(dispatch.triton_ops(), "triton")


@pytest.mark.parametrize(
    ("backend", "error"),
    [
        ("fastest", "LOCKIN_FAST_BACKEND is 'fastest'; expected one of reference, cpu, triton, cuda"),
        ("cuda", "LOCKIN_FAST_BACKEND=cuda, but this build has no CUDA C++ part"),
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


@nested
def test_every_op_passes_with_neither_compiled_part_nor_triton():
    passes([*NARROW, *WIDE], LOCKIN_FAST_TEST_WITHOUT="compiled,triton")


@nested
@needs_triton
def test_every_op_passes_in_the_interpreter():
    # Interpreted loops over wide rows are slow; a test of their own runs those.
    passes([*NARROW, *WIDE], but="scratch or 2304 or 4096", TRITON_INTERPRET="1")


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
        "baseline",
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
