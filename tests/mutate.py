"""python tests/mutate.py [TEXT ...]: break each kernel on purpose and show that its tests notice. make mutations

A mutation is a kernel's file, what to replace, and by what: the mask dropped, a sign turned, a latent off by one. Each
is applied to a copy of this tree, which is rebuilt where the file is C++ (of the kernels, only those for the
instruction set that will run), and the op's tests are run there; they have to fail. A mutation that survives is a hole
in the tests and makes the exit status non-zero. A text to replace that is not there exactly once is an error, so that
the list cannot go stale.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from mutations import MUTATIONS

ROOT = Path(__file__).resolve().parents[1]
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
COPIED = (
    "benchmarks", "csrc", "lockin_fast", "tests", "setup.py", "CMakeLists.txt", "pyproject.toml", "README.md",
    "LICENSE", "MANIFEST.in",
)  # fmt: skip


class Mutation(NamedTuple):
    """One fault: in `file`, the text `old`, found exactly once, becomes `new`; `tests` (`selection`) have to notice.

    `isa` names the instruction set whose kernels run; without it, the best of this processor.
    """

    file: str
    old: str
    new: str
    tests: str
    selection: str = ""
    isa: str = ""

    @property
    def name(self):
        return f"{self.file}: {' '.join(self.old.split())} -> {' '.join(self.new.split()) or 'nothing'}"


def copy_tree(target):
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"), symlinks=True)
        else:
            shutil.copy(source, target / name)


def environment(tree, mutation):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("LOCKIN_FAST_") and k != "TRITON_INTERPRET"}
    kept |= {
        "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'tests'}",
        "LOCKIN_FAST_CUDA": "0",
        "PYTHONWARNINGS": "ignore",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    kept |= {"LOCKIN_FAST_CPU_ISA": mutation.isa} if mutation.isa else {}
    return kept | ({"TRITON_INTERPRET": "1"} if "/triton/" in mutation.file else {})


def run(command, folder, tree, mutation):
    done = subprocess.run(command, cwd=folder, env=environment(tree, mutation), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{mutation.name}: {command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout


def build_all(tree, mutation):
    run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], tree, tree, mutation)
    return {file: file.read_bytes() for file in (tree / "lockin_fast").rglob("*.so")}


@cache
def serving_unit(tree, isa):
    asked = [sys.executable, "-c", "from lockin_fast import _native; print(_native.isa())"]
    return run(asked, tree, tree, Mutation("", "", "", "", isa=isa)).strip()


def build(tree, mutation):
    """Compiles what has changed, but of the kernels only those that will run here: the libraries are linked by hand."""
    folder = next((tree / "build").glob("cmake-*"))
    unit = f"unit_{serving_unit(tree, mutation.isa)}.dir"
    objects = [file.relative_to(folder) for file in folder.rglob("*.o")]
    targets = [str(file) for file in objects if "unit_" not in str(file) or unit in file.parts]
    targets += [file.name for file in folder.glob("_native*.so")]
    run([CMAKE, "--build", ".", "--target", *targets], folder, tree, mutation)
    commands = run([CMAKE, "--build", ".", "--", "-t", "commands", "liblockin_fast_cpu.so"], folder, tree, mutation)
    run(["sh", "-c", commands.splitlines()[-1]], folder, tree, mutation)
    # CMake's installation takes a file for the one that is there when both were written in the same second.
    for library in (tree / "lockin_fast").rglob("*.so"):
        shutil.copy(folder / library.name, library)


def run_tests(tree, mutation):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "mutations.interleaved"]
    command += [mutation.tests]
    command += ["-k", mutation.selection] if mutation.selection else []
    return subprocess.run(command, cwd=tree, env=environment(tree, mutation), capture_output=True, text=True)


@cache
def passes_unbroken(tree, tests, selection, isa, interpreted):
    """Whether the tests pass on the tree as it is; if not, their failing on a broken one would say nothing."""
    done = run_tests(tree, Mutation("/triton/" if interpreted else "", "", "", tests, selection, isa))
    if done.returncode:
        raise RuntimeError(f"{tests} -k {selection!r} does not pass on the unbroken tree\n{done.stdout[-2000:]}")
    return True


def is_compiled(mutation):
    """Whether setup.py has to run for it; the emulator's tests compile the CUDA kernels themselves."""
    return not mutation.file.endswith(".py") and "/cuda/" not in mutation.file


def noticed(tree, mutation, libraries):
    """True when the tests fail on the mutated tree."""
    file = tree / mutation.file
    text = file.read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.name}: found {text.count(mutation.old)} times, expected once")
    compiled = is_compiled(mutation)
    passes_unbroken(tree, mutation.tests, mutation.selection, mutation.isa, "/triton/" in mutation.file)
    try:
        file.write_text(text.replace(mutation.old, mutation.new))
        if compiled:
            build(tree, mutation)
        done = run_tests(tree, mutation)
        failed = done.returncode == 1 and re.search(r"\d+ failed", done.stdout) is not None
        return failed or done.returncode < 0  # by a signal: the fault wrote where it should not
    finally:
        file.write_text(text)
        for library, whole in libraries.items():
            library.write_bytes(whole)


def main(wanted):
    chosen = [
        m for m in (Mutation(*entry) for entry in MUTATIONS) if not wanted or any(text in m.name for text in wanted)
    ]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        libraries = build_all(tree, chosen[0]) if any(map(is_compiled, chosen)) else {}
        for mutation in chosen:
            try:
                result = "caught  " if noticed(tree, mutation, libraries) else "SURVIVED"
            except (RuntimeError, ValueError) as error:
                result = f"UNPROVEN: {error}\n  "
            print(result, mutation.name, flush=True)
            survivors += [] if result == "caught  " else [mutation.name]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} faults were noticed")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main(sys.argv[1:])
