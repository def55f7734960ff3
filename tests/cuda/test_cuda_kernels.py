"""The CUDA kernels, run thread by thread on the CPU; what emulator.h says it does not emulate is not tested here.

The tests of the ops run on the emulated kernels as they are; what is here beyond looks at what only CUDA has.
"""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "cuda"), str(TESTS / "ops")]

from emulation import COMPILER, SANITIZE, built, load  # noqa: E402
from penalty_oracle import assert_as_good_as_torch, clear_of_steps, per_token_penalty, problem  # noqa: E402

from lockin_fast import dispatch  # noqa: E402
from lockin_fast.kernels import gpu  # noqa: E402

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")

GIVEN = os.environ.get("LOCKIN_FAST_TEST_EMULATED")
SANITIZED = hasattr(ctypes.CDLL(None), "__asan_poison_memory_region")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ORDERS = [0, 1, 7, 8]


@pytest.fixture(scope="session")
def emulation():
    return load(GIVEN or str(built()))


@pytest.fixture
def order(emulation):
    """Sets the order of the threads and the size of the GPU for a test."""
    yield emulation.order
    emulation.order(2, 132)


def run_tests(files, library, *options, **environment):
    """Run tests with the emulated kernels serving the CPU."""
    environment |= {"LOCKIN_FAST_TEST_EMULATED": str(library), "LOCKIN_FAST_BACKEND": "reference"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *map(str, files), *options],
        cwd=TESTS.parent, env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    return int(re.search(r"(\d+) kernels were emulated", run.stdout)[1])


def test_every_op_that_is_registered_is_known_to_the_dispatcher(emulation):
    assert sorted(gpu.CUDA_OPS) == sorted(vars(emulation.ops))


@pytest.mark.skipif(GIVEN is not None, reason="runs such tests itself")
@pytest.mark.parametrize("name", sorted({dispatch.file_of(op) for op in gpu.CUDA_OPS}))
def test_the_tests_of_the_ops_pass_on_the_emulated_kernels(name):
    chosen = "not 4096 and not channel_outside"  # which a kernel on a GPU cannot raise for
    assert run_tests([TESTS / "ops" / f"test_{name}.py"], built(), "-k", chosen, OMP_NUM_THREADS="1") > 10


@pytest.mark.slow
@pytest.mark.skipif(GIVEN is not None, reason="runs such tests itself")
def test_the_tests_of_the_ops_pass_under_the_sanitizers(emulation):
    names = sorted({dispatch.file_of(op) for op in vars(emulation.ops)})
    files = [*(TESTS / "ops" / f"test_{name}.py" for name in names), Path(__file__)]
    libraries = (f"lib{name}.so" for name in ("asan", "ubsan"))
    found = [subprocess.check_output([COMPILER, f"-print-file-name={name}"], text=True).strip() for name in libraries]
    environment = {"LD_PRELOAD": ":".join(found), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    chosen = "not (compile or channel_outside or 2304 or 4096)"
    assert run_tests(files, built(*SANITIZE), "-k", chosen, **environment) > 100


def run_fault(emulation, name):
    out = torch.zeros(64, dtype=torch.int32)
    run = emulation.library.run_fault
    run.argtypes, run.restype = (ctypes.c_char_p, ctypes.c_void_p), ctypes.c_char_p
    said = run(name.encode(), out.data_ptr())
    return out, said and said.decode()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("barrier_that_some_leave_before", "waits for threads that do not come"),
        ("two_barriers", "waits here, but another waits at"),
        ("shuffle_that_some_miss", "waits for threads that do not come"),
        ("shuffle_from_outside", "reads a lane that took no part"),
    ],
)
def test_the_emulator_stops_at_a_fault(emulation, fault, said):
    error = run_fault(emulation, fault)[1]
    assert said in error and "faults.cu:" in error


def test_the_emulator_shows_what_no_barrier_guards(emulation, order):
    numbers = torch.arange(64, dtype=torch.int32)
    results = {}
    for seed in ORDERS:
        order(seed, 132)
        for fault in ("missing_barrier", "missing_warp_barrier", "with_barrier", "half_of_shared_memory_never_written"):
            results.setdefault(fault, []).append(run_fault(emulation, fault)[0])
    assert all(torch.equal(out, (numbers + 1) % 64) for out in results["with_barrier"])
    for out in results["half_of_shared_memory_never_written"]:
        assert (out[::2] == -1).all()  # the bits of a NaN
    for fault in ("missing_barrier", "missing_warp_barrier"):
        assert not all(torch.equal(out, results[fault][0]) for out in results[fault])


PROBLEMS = [
    (torch.bfloat16, (37, 96, 20)), (torch.float16, (21, 136, 100)), (torch.bfloat16, (9, 123, 33)),
    (torch.float32, (19, 132, 20)), (torch.float32, (9, 123, 41)),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "shape"), PROBLEMS, ids=str)
@pytest.mark.parametrize("ref", ["h", "z"])
def test_block_penalty_does_not_depend_on_the_order_of_threads(emulation, order, dtype, shape, ref):
    p = problem(*shape, dtype, ref=ref, masked=True, threshold=True, margin=True)
    results = []
    for seed in ORDERS:
        order(seed, 132)
        results.append(emulation.ops.block_penalty(*p.op_arguments))
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def assert_penalty_as_good_as_torch(emulation, p):
    per_token, _, active = emulation.ops.block_penalty(*p.op_arguments)
    truth = per_token_penalty(p.at(torch.float64), p.h.double())
    eager = per_token_penalty(p.at(torch.float32), p.h.float())
    assert_as_good_as_torch("per_token", per_token, truth, eager, clear_of_steps(p).all(1))
    return active


@pytest.mark.parametrize("processors", [132, 8, 4, 2, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block_penalty_on_a_gpu_of_any_size(emulation, order, dtype, processors):
    order(3, processors)
    p = problem(200, 72, 40, dtype, masked=True, threshold=True)
    active = assert_penalty_as_good_as_torch(emulation, p)
    assert (active - torch.ops.lockin_fast.block_penalty(*p.op_arguments)[2]).abs() <= (~clear_of_steps(p)).sum()


def shifted(x, by):
    """`x` [rows, columns] at an address `by` elements further than any alignment, and with a longer stride."""
    wide = torch.full((x.shape[0], x.shape[1] + 7), 9.0, dtype=x.dtype)
    wide[:, by : by + x.shape[1]] = x
    return wide[:, by : by + x.shape[1]]


def nf4(tokens, width, blocksize, outliers, dtype, seed=0):
    """Random codes, scales and outliers, and what they decode to by the formula."""
    make = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (tokens, width // 2), generator=make, dtype=torch.uint8)
    absmax = torch.rand(tokens, width // blocksize, generator=make) * 3
    channels = torch.randperm(width, generator=make)[:outliers].sort().values.to(torch.int32)
    kept = (torch.randn(tokens, outliers, generator=make) * 60).to(dtype)
    both = torch.stack((codes >> 4, codes & 15), dim=2).view(tokens, width).long()
    dense = (CODEBOOK[both] * absmax.repeat_interleave(blocksize, 1)).to(dtype)
    dense[:, channels.long()] = kept
    return (codes, absmax, channels, kept) if outliers else (codes, absmax, None, None), dense


CODEBOOK = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip


@pytest.mark.parametrize("outliers", [0, 1, 11])
@pytest.mark.parametrize("by", [0, 1])
@pytest.mark.parametrize(("tokens", "width", "blocksize"), [(37, 128, 64), (18, 320, 32), (9, 48, 16)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block_penalty_decodes_nf4_to_the_bits_of_a_dense_reference(
    emulation, order, dtype, tokens, width, blocksize, by, outliers
):
    if not hasattr(emulation.ops, "block_penalty_nf4"):
        pytest.skip("block_penalty_nf4 is not defined")
    order(5, 2)
    p = problem(tokens, width, 21, dtype, masked=True, threshold=True, margin=True)
    p.h = shifted(p.h, by) if by else p.h
    packed, dense = nf4(tokens, width, blocksize, outliers, dtype)
    p.h_ref = dense
    expected = emulation.ops.block_penalty(*p.op_arguments)
    latents = p.weight, p.bias, p.sign, *packed, p.mask, p.threshold
    found = emulation.ops.block_penalty_nf4(p.h, *latents, p.margin, False, blocksize)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    same = emulation.ops.block_penalty_nf4(shifted(dense, by) if by else dense, *latents, None, True, blocksize)
    assert not same[0].any() and not same[1].any() and same[2] == 0


@pytest.mark.parametrize("which", ["h", "h_ref", "weight"])
@pytest.mark.parametrize("by", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block_penalty_takes_rows_at_any_address(emulation, dtype, by, which):
    p = problem(20, 64, 13, dtype, masked=True)
    setattr(p, which, shifted(getattr(p, which), by))
    assert_penalty_as_good_as_torch(emulation, p)


@pytest.mark.skipif(not SANITIZED, reason="runs under the address sanitizer, by make slow")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 123])
def test_block_penalty_never_reads_a_masked_token(emulation, dtype, width):
    p = problem(40, 256, 13, dtype, masked=True)
    p.h, p.h_ref, p.weight = p.h[:, :width], p.h_ref[:, :width], p.weight[:, :width].contiguous()
    process = ctypes.CDLL(None)
    for poison in (process.__asan_poison_memory_region, process.__asan_unpoison_memory_region):
        poison.argtypes = ctypes.c_void_p, ctypes.c_size_t
    rows = [(x[t].data_ptr(), width * x.element_size()) for x in (p.h, p.h_ref) for t in range(40) if not p.mask[t]]
    assert rows
    for row in rows:
        process.__asan_poison_memory_region(*row)
    per_token = emulation.ops.block_penalty(*p.op_arguments)[0]
    for row in rows:
        process.__asan_unpoison_memory_region(*row)
    assert per_token.isfinite().all()
