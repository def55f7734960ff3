"""The CUDA kernels and their op wrappers, compiled for the CPU over emulator.h, as torch.ops.lockin_fast_emulated."""

import atexit
import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch

import lockin_fast.ops  # noqa: F401  defines the schemas

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMPILER = shutil.which("g++")
LIBRARY = "lockin_fast_emulated"
FLAGS = "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-unknown-pragmas", "-Wno-psabi"
SANITIZE = "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"


_serving = torch.library.Library("lockin_fast", "IMPL")


@dataclass
class Emulation:
    """The emulated ops, and the library they are in."""

    ops: SimpleNamespace
    library: ctypes.CDLL

    def order(self, seed, processors):
        """The order in which threads take their turns, as `emulate` of emulator.cpp has it, and the GPU's size."""
        self.library.emulate(seed, processors)

    def serve(self):
        """Let the emulated kernels serve CPU tensors in place of the compiled part, for the rest of the process."""
        for name, op in vars(self.ops).items():
            _serving.impl(name, op, "CPU")
        atexit.register(lambda: print(f"{self.library.launches()} kernels were emulated"))


def build(folder, *extra):
    """Compile everything under csrc/cuda and csrc/ops_cuda into `folder`; the path of the library."""
    wrappers = folder / "ops.cpp"
    sources = sorted(path for path in (ROOT / "csrc/ops_cuda").glob("*.cpp") if path.stem != "registration")
    wrappers.write_text("".join(f'#include "{path}"\n' for path in sources))  # one unit: torch's headers are slow
    torch_folder = Path(torch.__file__).parent
    commands = [
        ("-O0", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", torch_folder / "include", "-include",
         HERE / "emulated_ops.h", "-c", wrappers),
        ("-O2", "-U_FORTIFY_SOURCE", "-c", HERE / "emulator.cpp"),
    ]  # fmt: skip
    kernels = *(ROOT / "csrc/cuda").glob("*.cu"), HERE / "faults.cu"
    commands += [("-O1", "-include", HERE / "emulator.h", "-x", "c++", "-c", path) for path in kernels]
    objects = [folder / f"{i}.o" for i in range(len(commands))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command, to: _run(COMPILER, *FLAGS, *extra, *command, "-o", to), commands, objects))
    library = folder / f"{LIBRARY}.so"
    _run(COMPILER, *extra, "-shared", *objects, "-o", library, f"-L{torch_folder / 'lib'}", "-ltorch_cpu")
    return library


def built(*extra):
    """The library, built at most once for what the sources hold now, also when several processes ask."""
    key = hashlib.sha256(repr((torch.__version__, extra)).encode())
    for path in sorted((*ROOT.glob("csrc/*/*"), *HERE.glob("*"))):
        if path.suffix in (".cu", ".cpp", ".h") or path == Path(__file__):
            key.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build" / "emulated" / key.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "done"
        if not done.exists():
            build(folder, *extra)
            done.touch()
    return folder / f"{LIBRARY}.so"


def _run(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[-4000:]}")


@cache
def load(path):
    """Define the ops under the emulation's name and load the library; once a process."""
    names = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    defined = {op for namespace, _, op in names if namespace == "lockin_fast"}
    for name in defined:
        schema = str(getattr(torch.ops.lockin_fast, name).default._schema)
        torch.library.define(f"{LIBRARY}::{name}", schema[schema.index("(") :])
    torch.ops.load_library(str(path))
    has_kernel, namespace = torch._C._dispatch_has_kernel_for_dispatch_key, getattr(torch.ops, LIBRARY)
    ops = {name: getattr(namespace, name).default for name in defined if has_kernel(f"{LIBRARY}::{name}", "CPU")}
    library = ctypes.CDLL(str(path))
    library.emulate.argtypes = ctypes.c_uint, ctypes.c_int
    library.emulate.restype = None
    return Emulation(SimpleNamespace(**ops), library)
