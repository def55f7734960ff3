"""What runs where on this machine, and why."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

import lockin_fast

EXTRAS = {
    "train": ("transformers", "peft", "accelerate"),
    "report": ("matplotlib", "jinja2"),
    "cli": ("typer", "rich", "tqdm", "pyyaml"),
    "triton": ("triton",),
}
MODULES = {"pyyaml": "yaml"}
GPU_RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


class Finding(NamedTuple):
    """One line of the diagnosis, under a heading."""

    heading: str
    name: str
    value: str


def diagnose() -> list[Finding]:
    """Return versions, processor, compiled part, GPU, extras, and for every op its backend, reason and fallbacks."""
    return [*_machine(), *_compiled_part(), *_gpu(), *_extras(), *_ops()]


def _machine() -> list[Finding]:
    return [
        Finding("machine", name, value)
        for name, value in (
            ("lockin_fast", f"{lockin_fast.__version__} in {Path(lockin_fast.__file__).parent}"),
            ("python", f"{platform.python_version()} on {platform.platform()}"),
            (
                "torch",
                f"{torch.__version__}, {torch.get_num_threads()} threads",
            ),
            ("processors", str(os.cpu_count())),
        )
    ]


def _compiled_part() -> list[Finding]:
    heading = "compiled part"
    try:
        from lockin_fast import _native
    except ImportError as error:
        return [
            Finding(
                heading,
                "native module",
                f"absent ({error}); plain torch serves every op. To build it: pip install . with a C++17 compiler",
            )
        ]
    info = _native.build_info()
    return [
        Finding(heading, "native module", ", ".join(f"{name} {value}" for name, value in info.items())),
        Finding(heading, "processor runs", ", ".join(_native.cpu_features())),
        Finding(heading, "chosen level", _chosen_level(_native)),
    ]


def _chosen_level(native) -> str:
    try:
        return native.isa()
    except RuntimeError as error:
        return f"none: {error}"


def _gpu() -> list[Finding]:
    heading = "GPU"
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        cuda = f"CUDA {torch.version.cuda}: {names}"
    else:
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        cuda = f"no CUDA device; this torch is {build}"
    triton = (
        f"{_version('triton')} installed" if find_spec("triton") else "not installed: pip install 'lockin-fast[triton]'"
    )
    measured = sorted(path.name for path in GPU_RESULTS.glob("gpu*")) if GPU_RESULTS.is_dir() else []
    tried = (
        f"measured on a GPU, see benchmarks/results/{measured[-1]}"
        if measured
        else (
            "no kernel of this project has been run on a GPU yet; tests interpret them and compile them ahead of time"
        )
    )
    return [Finding(heading, "device", cuda), Finding(heading, "triton", triton), Finding(heading, "kernels", tried)]


def _extras() -> list[Finding]:
    findings = []
    for extra, packages in EXTRAS.items():
        missing = [name for name in packages if find_spec(MODULES.get(name, name)) is None]
        have = ", ".join(f"{name} {_version(name)}" for name in packages if name not in missing)
        lack = f"missing {', '.join(missing)}: pip install 'lockin-fast[{extra}]'" if missing else ""
        findings.append(Finding("extras", extra, "; ".join(filter(None, (have, lack)))))
    return findings


def _ops() -> list[Finding]:
    findings = []
    for row in lockin_fast.backends():
        findings.append(Finding("ops", f"{row.op} on {row.device}", f"{row.backend}: {row.why}"))
        findings += [
            Finding("ops", "", f"{calls} calls fell back to the reference: {why}")
            for why, calls in row.fallbacks.items()
        ]
    return findings


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"
