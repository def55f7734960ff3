"""Builds the compiled part with CMake and Ninja; everything else about the package is in pyproject.toml.

LOCKIN_FAST_NO_BUILD=1 skips the compiled part. Without a C++ compiler the installation still succeeds: the reference
kernels, in plain torch, then serve every op. Without Python's headers only `_native` is left out. CUDA kernels are
compiled where nvcc is found, for sm_80, sm_90 and sm_100: LOCKIN_FAST_CUDA=0 leaves them out, =1 insists, and
LOCKIN_FAST_CUDA_ARCHS="80 90" names other chips.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
COMPILERS = ("c++", "g++", "clang++")


def missing_tool():
    """The reason why nothing can be compiled here, or None."""
    if sys.platform not in ("linux", "darwin"):
        return f"the platform {sys.platform} is not supported by the build"
    if not os.environ.get("CXX") and not any(map(shutil.which, COMPILERS)):
        return f"no C++ compiler was found (looked for $CXX, {', '.join(COMPILERS)})"
    absent = [module for module in ("torch", "pybind11") if importlib.util.find_spec(module) is None]
    absent += [program for program in ("cmake", "ninja") if tool(program) is None]
    if absent:
        return f"{', '.join(absent)} not found by the Python that builds, {sys.executable}"
    return None


def tool(name):
    """The program of that name beside this Python, else the one on PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


NOTHING = "The package works, but the slow reference kernels (plain torch) will serve every op."
NO_NATIVE = "The fast kernels were built and serve; only lockin_fast._native, which the doctor reads, is left out."


def announce(what, consequence):
    line = "!" * 100
    print("\n".join((line, f"lockin_fast: {what}.", consequence, line)), file=sys.stderr, flush=True)


class CMakeBuild(build_ext):
    """Hands both libraries to one CMake build and installs them beside the Python files."""

    def run(self):
        reason = missing_tool()
        if reason:
            announce(f"NOTHING WAS COMPILED: {reason}", NOTHING)
            return
        target = ROOT if self.inplace else Path(self.build_lib).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        torch = Path(importlib.util.find_spec("torch").origin).parent
        cmake = tool("cmake")
        subprocess.run(
            [
                cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
                f"-DCMAKE_INSTALL_PREFIX={target}",
                f"-DPython3_EXECUTABLE={sys.executable}",
                f"-DPYTHON_EXECUTABLE={sys.executable}",
                f"-DLOCKIN_FAST_TORCH_DIR={torch}",
                f"-DLOCKIN_FAST_TORCH_VERSION={importlib.metadata.version('torch')}",
                f"-DLOCKIN_FAST_VERSION={self.distribution.get_version()}",
                f"-DLOCKIN_FAST_CUDA={os.environ.get('LOCKIN_FAST_CUDA', 'auto')}",
                f"-DLOCKIN_FAST_CUDA_ARCHS={os.environ.get('LOCKIN_FAST_CUDA_ARCHS', '').replace(' ', ';')}",
            ],
            check=True,
        )  # fmt: skip
        subprocess.run([cmake, "--build", str(build)], check=True)
        subprocess.run([cmake, "--install", str(build)], check=True)
        if not list(build.glob("_native*.so")):
            announce(f"_native WAS NOT COMPILED: {sys.executable} has no headers (Python.h; python3-dev)", NO_NATIVE)

    def get_outputs(self):
        built = Path(self.build_lib) / "lockin_fast"
        return [str(path) for path in built.rglob("*.so")]


extensions = [] if os.environ.get("LOCKIN_FAST_NO_BUILD") == "1" else [Extension("lockin_fast._native", sources=[])]
if not extensions:
    announce("NOTHING WAS COMPILED: LOCKIN_FAST_NO_BUILD=1 is set", NOTHING)
setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
