"""What runs where on this machine, and why."""

import os
import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

import lockin_fast
from lockin_fast import dispatch
from lockin_fast.kernels import gpu

EXTRAS = {
    "train": ("transformers", "peft", "accelerate"),
    "report": ("matplotlib", "jinja2"),
    "cli": ("typer", "rich", "pyyaml"),
    "triton": ("triton",),
    "quantization": ("bitsandbytes",),
    "trl": ("trl",),
    "ray": ("ray",),
    "lockin": ("scipy",),
    "endpoint": ("httpx2",),
    "tables": ("pyarrow",),
}
MODULES = {"pyyaml": "yaml"}


class Finding(NamedTuple):
    """One line of the diagnosis, under a heading; `error` marks what will fail and says what to do."""

    heading: str
    name: str
    value: str
    error: bool = False


def diagnose() -> list[Finding]:
    """Return versions, processor, compiled part, GPU, extras, and for every op its backend, reason and fallbacks.

    What is set up wrongly is a finding with `error` true; nothing is raised.
    """
    return [*_machine(), *_compiled_part(), *_gpu(), *_extras(), *_ops()]


def _machine() -> list[Finding]:
    return [
        Finding("machine", name, value)
        for name, value in (
            ("lockin_fast", f"{lockin_fast.__version__} in {Path(lockin_fast.__file__).parent}"),
            ("python", f"{platform.python_version()} on {platform.platform()}"),
            ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
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
                f"absent ({error}); below is what serves each op. To build it: pip install . with a C++17 compiler and "
                "Python's headers (Python.h)",
            )
        ]
    info = _native.build_info()
    return [
        Finding(heading, "native module", ", ".join(f"{name} {value}" for name, value in info.items())),
        Finding(heading, "processor runs", ", ".join(_native.cpu_features())),
        _chosen_level(heading, _native),
    ]


def _chosen_level(heading: str, native) -> Finding:
    try:
        return Finding(heading, "chosen level", native.isa())
    except RuntimeError as error:
        return Finding(heading, "chosen level", f"{error} Until then every compiled op fails", error=True)


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
    return [
        Finding(heading, "device", cuda),
        Finding(heading, "triton", triton),
        *(Finding(heading, "measured", text) for text in _measured()),
    ]


def _measured() -> list[str]:
    """What has run on a GPU and what never has, by the rows of benchmarks/results/gpu*.csv."""
    if not gpu.RESULTS.is_dir():
        return ["what has run on a GPU is in benchmarks/results, which comes with the source and is not installed here"]
    seen: dict[tuple[str, str, str], set[str]] = {}
    for run in gpu.runs():
        seen.setdefault((run.gpu, run.commit, run.file), set()).add(f"{run.op} ({run.backend})")
    ran = [
        f"{', '.join(sorted(kernels))} on {name} at commit {commit} (benchmarks/results/{file})"
        for (name, commit, file), kernels in seen.items()
    ]
    never = [f"never run on a GPU, in {name}: {', '.join(ops)}" for name, ops in _never_run().items()]
    if not ran:
        ran = [
            "no kernel of this project has ever run on a GPU, by benchmarks/results; the tests run the Triton kernels "
            "in its interpreter and compile them, and those in CUDA C++, ahead of time"
        ]
    return ran + never


def _never_run() -> dict[str, list[str]]:
    try:
        import_module("lockin_fast.ops")
    except (RuntimeError, ValueError):  # reported under the heading of the ops
        return {}
    return dispatch.never_run_on_gpu()


def _extras() -> list[Finding]:
    findings = []
    for extra, packages in EXTRAS.items():
        missing = [name for name in packages if find_spec(MODULES.get(name, name)) is None]
        have = ", ".join(f"{name} {_version(name)}" for name in packages if name not in missing)
        lack = f"missing {', '.join(missing)}: pip install 'lockin-fast[{extra}]'" if missing else ""
        findings.append(Finding("extras", extra, "; ".join(filter(None, (have, lack)))))
    return findings


def _ops() -> list[Finding]:
    try:
        report = lockin_fast.backends()
    except (RuntimeError, ValueError) as error:  # an environment variable asks for what cannot be had
        return [Finding("ops", "none loads", str(error), error=True)]
    findings = []
    for row in report:
        findings.append(Finding("ops", f"{row.op} on {row.device}", f"{row.backend}: {row.why}"))
        findings += [
            Finding("ops", "", f"{calls} calls fell back: {why}")
            for why, calls in row.fallbacks.items()
        ]
    return findings


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"
