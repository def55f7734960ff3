"""What a result came from besides settings and inputs: versions of libraries, and the kernels that served the ops."""

import dataclasses
from typing import Any

import torch

CHOSEN = ("LOCKIN_FAST_BACKEND=", "TRITON_INTERPRET=", "stock torch")  # reasons for the reference that are no loss


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    from platform import platform, python_version

    import lockin_fast

    found = {"lockin_fast": lockin_fast.__version__, "python": python_version(), "platform": platform()}
    return found | {name: version(name) for name in ("torch", "transformers", "peft")}


def version(package: str) -> str:
    """The version of an installed package, "not installed" for one that is absent."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed(package)
    except PackageNotFoundError:
        return "not installed"


def kernels() -> dict[str, Any]:
    """The instruction set of the compiled part (null without it), and `backends()` as plain values."""
    from lockin_fast.dispatch import backends

    try:
        from lockin_fast import _native

        isa = _native.isa()
    except (ImportError, RuntimeError):  # RuntimeError: LOCKIN_FAST_CPU_ISA asks for what cannot be served
        isa = None
    return {"isa": isa, "ops": [dataclasses.asdict(row) for row in backends()]}


def slow_kernels() -> str | None:
    """One line if an op was served more slowly on the device of training than was to be expected."""
    from lockin_fast.dispatch import backends

    device = "cuda" if torch.cuda.is_available() else "cpu"
    reasons: dict[str, list[str]] = {}
    for row in backends():
        if row.device != device:
            continue
        if row.backend == "reference" and not row.why.startswith(CHOSEN):
            reasons.setdefault(row.why, []).append(row.op)
        for reason, calls in row.fallbacks.items():
            reasons.setdefault(reason, []).append(f"{row.op} ({calls} calls)")
    if not reasons:
        return None
    causes = "; ".join(f"{', '.join(ops)}: {reason}" for reason, ops in reasons.items())
    return f"not the fastest way on {device}: {causes}"
