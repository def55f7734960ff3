"""python -m benchmarks.gpu_suite: everything a CUDA machine can say about this project, in one command.

Builds the compiled parts, runs the tests of the ops on the GPU under each backend that has kernels there, runs NVIDIA's
compute-sanitizer over them where it is installed, measures every benchmark under each backend, and writes

    benchmarks/results/gpu_tests.csv        one row per op and backend: did its tests pass on this GPU
    benchmarks/results/gpu_benchmarks.csv   every case, provider and backend
    lockin_fast/kernels/gpu_defaults.json   which backend serves which op by default: the faster one

--skip names parts to leave out: build, tests, sanitizer, benchmarks.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import gpu_defaults, run
from benchmarks.measure import describe, provenance, write_csv

ROOT = Path(__file__).parents[1]
PARTS = ("build", "tests", "sanitizer", "benchmarks")
BACKENDS = ("triton", "cuda")
SERVED = "import lockin_fast\nfor r in lockin_fast.backends():\n  if r.device == 'cuda': print(r.op, r.backend)"


def on_gpu(backend):
    return {**os.environ, "LOCKIN_FAST_BACKEND": backend, "LOCKIN_FAST_TEST_DEVICE": "cuda"}


def served_by(backend):
    """The ops that a process with this backend forced serves with it on the GPU."""
    done = subprocess.run([sys.executable, "-c", SERVED], env=on_gpu(backend), capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        print(f"{backend}: nothing to run, {done.stderr.strip().splitlines()[-1]}")
    pairs = [line.split() for line in done.stdout.splitlines()]
    return [op for op, backend_of_op in pairs if backend_of_op == backend]


def build():
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, check=True)


def test_files(op):
    """The test files of an op; those that serve several ops are named like the file that defines them."""
    import lockin_fast.ops  # noqa: F401  the ops' own files are known once they are defined
    from lockin_fast import dispatch

    return sorted((ROOT / "tests" / "ops").glob(f"test_{dispatch.file_of(op)}*.py"))


def tests():
    rows = []
    for backend in BACKENDS:
        outcome = {}
        for op in served_by(backend):
            files = tuple(map(str, test_files(op)))
            if files not in outcome:
                command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not peers and not browser", *files]
                outcome[files] = subprocess.run(command, env=on_gpu(backend), cwd=ROOT).returncode == 0
            rows.append({"op": op, "backend": backend, "tests": "passed" if outcome[files] else "failed"})
    if rows:
        print(f"written to {write_csv('gpu_tests', rows)}")
    return all(row["tests"] == "passed" for row in rows)


def sanitizer():
    """memcheck and racecheck over small problems of every op; True when clean or not installed."""
    tool = shutil.which("compute-sanitizer")
    if not tool:
        print("compute-sanitizer is not installed: nothing was checked with it")
        return True
    clean = True
    for check in ("memcheck", "racecheck"):
        for backend in BACKENDS:
            for file in sorted({path for op in served_by(backend) for path in test_files(op)}):
                command = [tool, "--tool", check, "--error-exitcode", "9", "--target-processes", "all"]
                command += [sys.executable, "-m", "pytest", "-q", "-x", str(file), "-k", "not 2304 and not 4096"]
                code = subprocess.run(command, env=on_gpu(backend), cwd=ROOT, timeout=300).returncode
                print(f"{check} of {file.name} under {backend}: {'clean' if code == 0 else f'exit status {code}'}")
                clean &= code == 0
    return clean


def benchmarks(rounds):
    rows = []
    for backend in BACKENDS:
        ops = set(served_by(backend))
        os.environ["LOCKIN_FAST_BACKEND"] = backend
        for name in run.names():
            if any(ops & set(case.ops) for case in run.cases_of(name)):
                rows += run.run(name, run.parser().parse_args([name, "--device", "cuda", "--prefix", "gpu_", *rounds]))
        del os.environ["LOCKIN_FAST_BACKEND"]
    if rows:
        print(f"written to {write_csv('gpu_benchmarks', rows)}")
        print(f"written to {gpu_defaults.write()}")


def main():
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_suite", description=__doc__)
    parser.add_argument("--skip", nargs="*", default=(), choices=PARTS)
    parser.add_argument("--rounds", help="of each benchmark, instead of each case's own")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device here; this suite is for a machine that has one")
    print(describe(provenance()))
    good = True
    if "build" not in options.skip:
        build()
    if "tests" not in options.skip:
        good &= tests()
    if "sanitizer" not in options.skip:
        good &= sanitizer()
    if "benchmarks" not in options.skip:
        benchmarks(["--rounds", options.rounds] if options.rounds else [])
    sys.exit(not good)


if __name__ == "__main__":
    main()
