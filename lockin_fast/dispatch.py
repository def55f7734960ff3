"""Which kernel serves which op on which device, why, and what fell back.

Every op has a reference in plain torch, registered as the dispatcher's default kernel. Faster kernels are registered
over it, per device, when the ops are first imported: the compiled CPU part from its shared object, Triton from Python.
The environment is read then, once; a call costs no look-up beyond torch's own dispatcher.
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from lockin_fast.kernels import Refused

BACKENDS = ("reference", "cpu", "triton", "cuda")
CPU_PART = Path(__file__).parent / "_build" / "liblockin_fast_cpu.so"
TRITON_KERNELS = Path(__file__).parent / "kernels" / "triton"

FORCED = os.environ.get("LOCKIN_FAST_BACKEND", "")

_library = torch.library.Library("lockin_fast", "FRAGMENT")
_served = {}  # (op, device) -> (backend, why)
_references = {}  # op -> the plain torch implementation
_detours = {}  # (op, device) -> which calls do not reach the backend that serves the others
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
                lines.append(f"{'':<37}{calls} calls fell back to the reference: {reason}")
        return "\n".join(lines)


def backends():
    """Report of every op: which backend serves it on each device, why, and the fallbacks so far.

    Returns a `BackendReport`: a list of `OpBackend(op, device, backend, why, fallbacks)`, printable as a table. A
    fallback is a call that a fast kernel could not take; it ran on the reference and is counted here with its reason.
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
    return [op for op in _references if (TRITON_KERNELS / f"{_file(op)}.py").exists()]


def _file(op):
    return _references[op].__module__.rpartition(".")[2]


def detour(op, device, which):
    """Let the report say which calls of `op` leave for stock torch before the dispatcher sees them."""
    _detours[op, device] = which


def activate():
    """Register the fast kernels this process can use. Called once, when `lockin_fast.ops` is imported."""
    forced = FORCED
    if forced not in ("", *BACKENDS):
        raise ValueError(f"LOCKIN_FAST_BACKEND is {forced!r}; expected one of {', '.join(BACKENDS)}, or unset")
    interpreting = os.environ.get("TRITON_INTERPRET", "") not in ("", "0")
    cpu_missing, triton_missing = _load_cpu_part(forced, interpreting), _triton_missing()
    if forced == "reference":
        _serve(_references, "cpu", "reference", "LOCKIN_FAST_BACKEND=reference")
        _serve(_references, "cuda", "reference", "LOCKIN_FAST_BACKEND=reference")
        return
    if forced == "cuda":
        raise RuntimeError("LOCKIN_FAST_BACKEND=cuda, but this build has no CUDA C++ part; unset it, or use triton")
    if forced == "cpu" and cpu_missing:
        raise RuntimeError(f"LOCKIN_FAST_BACKEND=cpu, but {cpu_missing}")
    if forced == "triton":
        if triton_missing:
            raise RuntimeError(f"LOCKIN_FAST_BACKEND=triton, but {triton_missing}")
        if not interpreting and not torch.cuda.is_available():
            raise RuntimeError(
                "LOCKIN_FAST_BACKEND=triton, but there is no CUDA device; "
                "set TRITON_INTERPRET=1 to interpret on the CPU"
            )
    why = f"LOCKIN_FAST_BACKEND={forced}" if forced else None

    if not triton_missing and forced != "cpu":
        _register_triton("cuda", why or "triton is installed")
    elif not triton_missing:
        _serve(_references, "cuda", "reference", why)
    else:
        _serve(_references, "cuda", "reference", triton_missing)

    if not cpu_missing:
        # Depending on the processor, the compiled part leaves to stock torch what is as fast there.
        compiled = [op for op in _references if _has_cpu_kernel(op)]
        _serve(compiled, "cpu", "cpu", why or "compiled part loaded")
        stock = "stock torch matrix products over tiles are as fast"
        _serve([op for op in _references if op not in compiled], "cpu", "reference", stock)
    elif interpreting and not triton_missing:
        _register_triton("cpu", why or "TRITON_INTERPRET=1")
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


def _has_cpu_kernel(op):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"lockin_fast::{op}", "CPU")


def _triton_missing():
    try:
        found = find_spec("triton") is not None
    except (ImportError, ValueError):
        found = False
    return None if found else "triton is not installed: pip install lockin_fast[triton]"


def _register_triton(device, why):
    ops = triton_ops()
    for op in ops:
        _library.impl(op, _triton_kernel(op, device), device.upper())
    _serve(ops, device, "triton", why)


def _triton_kernel(op, device):
    """The kernel registered for `op`: imports triton at the first call, and hands on what it cannot take."""
    launch = None

    def kernel(*args):
        nonlocal launch
        if launch is None:
            launch = getattr(import_module(f"lockin_fast.kernels.triton.{_file(op)}"), op)
        try:
            if device == "cpu":
                return launch(*args)
            with torch.cuda.device(args[0].device):
                return launch(*args)
        except Refused as reason:
            _fallbacks[op, device, str(reason)] += 1
            return _references[op](*args)

    return kernel
