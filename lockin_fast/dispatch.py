"""Which kernel serves which op on which device, why, and what fell back.

Every op has a reference in plain torch, registered as the dispatcher's default kernel. Faster kernels are registered
over it, per device, when the ops are first imported: the compiled CPU and CUDA parts from their shared objects, Triton
from Python. On a GPU an op is served by the backend that measured faster there, and by Triton until one did.
The environment is read then, once; a call costs no look-up beyond torch's own dispatcher.
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Lock

import torch

from lockin_fast.kernels import Refused, gpu

BACKENDS = ("reference", "cpu", "triton", "cuda")
CPU_PART = Path(__file__).parent / "_build" / "liblockin_fast_cpu.so"
CUDA_PART = CPU_PART.with_name("liblockin_fast_cuda.so")
TRITON_KERNELS = Path(__file__).parent / "kernels" / "triton"

FORCED = os.environ.get("LOCKIN_FAST_BACKEND", "")

_library = torch.library.Library("lockin_fast", "FRAGMENT")
_served = {}  # (op, device) -> (backend, why)
_references = {}  # op -> the plain torch implementation
_stock = {}  # op -> why the compiled CPU part may leave it to the reference
_detours = {}  # (op, device) -> which calls do not reach the backend that serves the others
_interpreter = Lock()  # triton's keeps its state in globals: one kernel at a time
_fallbacks = Counter()  # (op, device, reason) -> calls


@dataclass(frozen=True)
class OpBackend:
    """The kernel of one op on one device: `backend`, `why` it was chosen, and `fallbacks` (reason -> calls so far)."""

    op: str
    device: str
    backend: str
    why: str
    fallbacks: dict = field(default_factory=dict)


class BackendReport(list):
    """A list of `OpBackend` that prints as a table."""

    def __str__(self):
        lines = [f"{'op':<18}{'device':<8}{'backend':<11}why"]
        for row in self:
            lines.append(f"{row.op:<18}{row.device:<8}{row.backend:<11}{row.why}")
            for reason, calls in row.fallbacks.items():
                lines.append(f"{'':<37}{calls} calls fell back: {reason}")
        lines += [f"never run on a GPU, in {name}: {', '.join(ops)}" for name, ops in never_run_on_gpu().items()]
        return "\n".join(lines)


def backends():
    """Report of every op: which backend serves it on each device, why, and the fallbacks so far.

    Returns a `BackendReport`: a list of `OpBackend(op, device, backend, why, fallbacks)`, printable as a table. A
    fallback is a call that a fast kernel could not take, and that ran on the reference, or one that could not be made
    where it is fast (see `fell_back`); it is counted here with its reason.
    Below the table stand the GPU kernels that have never run on a GPU, by the files of benchmarks/results.
    """
    import_module("lockin_fast.ops")
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    rows = BackendReport()
    for op in _references:
        for device in devices:
            backend, why = _served.get((op, device), ("reference", "no faster kernel here"))
            if backend != "reference" and (op, device) in _detours:
                why += f"; {_detours[op, device]}"
            counts = {reason: calls for (o, d, reason), calls in _fallbacks.items() if (o, d) == (op, device)}
            rows.append(OpBackend(op, device, backend, why, counts))
    return rows


def define(name, schema, reference, fake):
    """Define `lockin_fast::name`, with the plain torch `reference` as its default kernel and `fake` for tracing."""
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lockin_fast::{name}", fake, lib=_library)
    _references[name] = reference


def triton_ops():
    """The ops that have a Triton kernel: a file named like the op's own, which launches it under the op's name."""
    return [op for op in _references if (TRITON_KERNELS / f"{file_of(op)}.py").exists()]


def file_of(op):
    """The name of the file under ops/ that defines `op`; its kernels and tests go by the same name."""
    return _references[op].__module__.rpartition(".")[2]


def never_run_on_gpu():
    """{backend: ops} of the GPU kernels that no file of benchmarks/results has seen on a GPU."""
    return gpu.never_run(triton_ops())


def fell_back(op, device, reason):
    """Count a call that something slower stood in for, for the report."""
    _fallbacks[op, device, reason] += 1


def detour(op, device, which):
    """Let the report say which calls of `op` leave for stock torch before the dispatcher sees them."""
    _detours[op, device] = which


def stock(op, why):
    """Let the report say why the compiled part has no kernel of `op` on some processors."""
    _stock[op] = why


def activate():
    """Register the fast kernels this process can use. Called once, when `lockin_fast.ops` is imported."""
    forced = FORCED
    if forced not in ("", *BACKENDS):
        raise ValueError(f"LOCKIN_FAST_BACKEND is {forced!r}; expected one of {', '.join(BACKENDS)}, or unset")
    interpreting = os.environ.get("TRITON_INTERPRET", "") not in ("", "0")
    triton_missing = _triton_missing()
    if forced == "triton":
        if triton_missing:
            raise RuntimeError(f"LOCKIN_FAST_BACKEND=triton, but {triton_missing}")
        if not interpreting and not torch.cuda.is_available():
            raise RuntimeError(
                "LOCKIN_FAST_BACKEND=triton, but there is no CUDA device; "
                "set TRITON_INTERPRET=1 to interpret on the CPU"
            )
    _activate_cuda(forced, triton_missing)
    _activate_cpu(forced, triton_missing, interpreting)


def _activate_cuda(forced, triton_missing):
    if forced in ("reference", "cpu"):
        _serve(_references, "cuda", "reference", f"LOCKIN_FAST_BACKEND={forced}")
        return
    triton = [] if triton_missing else triton_ops()
    measured = gpu.defaults()
    if forced:
        compiled = gpu.CUDA_OPS if forced == "cuda" else ()
    else:
        compiled = [op for op in gpu.CUDA_OPS if op not in triton or measured.get(op, ("",))[0] == "cuda"]
    cuda_missing = _load_cuda_part(compiled) if compiled or forced == "cuda" else None
    if forced == "cuda" and cuda_missing:
        raise RuntimeError(f"LOCKIN_FAST_BACKEND=cuda, but {cuda_missing}")
    served = {op: "triton" for op in triton} | {op: "cuda" for op in compiled if not cuda_missing}
    _register_triton("cuda", [op for op, backend in served.items() if backend == "triton"])
    for op in _references:
        backend = served.get(op, "reference")
        faster, file = measured.get(op, (None, None))
        if forced:
            why = f"LOCKIN_FAST_BACKEND={forced}" + ("" if backend == forced else ", which has no kernel for it")
        elif faster == backend:
            why = f"measured faster on a GPU ({file})"
        elif faster:
            why = f"{faster} measured faster ({file}), but {cuda_missing if faster == 'cuda' else triton_missing}"
        elif backend == "triton":
            why = "triton is installed, and no measurement prefers another"
        else:
            why = "; ".join(filter(None, (triton_missing or "no triton kernel", cuda_missing)))
        _serve([op], "cuda", backend, why)


def _activate_cpu(forced, triton_missing, interpreting):
    cpu_missing = _load_cpu_part(forced, interpreting)
    if forced == "cpu" and cpu_missing:
        raise RuntimeError(f"LOCKIN_FAST_BACKEND=cpu, but {cpu_missing}")
    why = f"LOCKIN_FAST_BACKEND={forced}" if forced else None
    if not cpu_missing:
        compiled = [op for op in _references if _has_cpu_kernel(op)]
        _serve(compiled, "cpu", "cpu", why or "compiled part loaded")
        for op in _references:
            if op not in compiled:
                _serve([op], "cpu", "reference", _stock.get(op, "the compiled part lacks it: build it again"))
    elif interpreting and not triton_missing and forced in ("", "triton"):
        _register_triton("cpu", triton_ops())
        _serve(triton_ops(), "cpu", "triton", why or "TRITON_INTERPRET=1")
    else:
        _serve(_references, "cpu", "reference", cpu_missing)


def _serve(ops, device, backend, why):
    _served.update({(op, device): (backend, why) for op in ops})


def _load_cpu_part(forced, interpreting):
    """Load the compiled CPU kernels; the reason as text when they are not to be had or not wanted."""
    if forced not in ("", "cpu"):
        return f"LOCKIN_FAST_BACKEND={forced}"
    if interpreting and forced != "cpu":
        return "TRITON_INTERPRET=1"
    if not CPU_PART.exists():
        return "the compiled part is missing: build it with `pip install -e .`"
    try:
        torch.ops.load_library(str(CPU_PART))
    except OSError as error:
        return f"the compiled part does not load: {error}"
    return None


def _load_cuda_part(ops):
    """Load the CUDA kernels of these ops and no others; the reason as text when they are not to be had.

    The library registers what LOCKIN_FAST_CUDA_OPS names while it loads.
    """
    if not torch.version.cuda:
        return "this torch is not built for CUDA"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if not CUDA_PART.exists():
        return "the CUDA part is missing: build it with nvcc on the PATH, `LOCKIN_FAST_CUDA=1 pip install -e .`"
    os.environ["LOCKIN_FAST_CUDA_OPS"] = ",".join(ops)
    try:
        torch.ops.load_library(str(CUDA_PART))
    except OSError as error:
        return f"the CUDA part does not load: {error}"
    finally:
        del os.environ["LOCKIN_FAST_CUDA_OPS"]
    return None


def _has_cpu_kernel(op):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"lockin_fast::{op}", "CPU")


def _triton_missing():
    try:
        found = find_spec("triton") is not None
    except (ImportError, ValueError):
        found = False
    return None if found else "triton is not installed: pip install lockin_fast[triton]"


def _register_triton(device, ops):
    for op in ops:
        _library.impl(op, _triton_kernel(op, device), device.upper())


def _triton_kernel(op, device):
    """The kernel registered for `op`: imports triton at the first call, and hands on what it cannot take."""
    launch = None

    def kernel(*args):
        nonlocal launch
        if launch is None:
            launch = getattr(import_module(f"lockin_fast.kernels.triton.{file_of(op)}"), op)
        try:
            if device == "cpu":
                with _interpreter:
                    return launch(*args)
            with torch.cuda.device(args[0].device):
                return launch(*args)
        except Refused as reason:
            fell_back(op, device, str(reason))
            return _references[op](*args)

    return kernel
