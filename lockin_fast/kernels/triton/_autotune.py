"""Measured configurations, opt-in by LOCKIN_FAST_AUTOTUNE=1 and kept in a file of the user's cache directory.

Without it, and wherever kernels do not really run, the given configuration is used as it is.
"""

import json
import os
import tempfile
from functools import cache
from pathlib import Path

import torch
import triton

WANTED = os.environ.get("LOCKIN_FAST_AUTOTUNE", "") not in ("", "0")


def cache_file():
    """Where the results are: LOCKIN_FAST_CACHE, or lockin_fast in the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LOCKIN_FAST_CACHE") or Path(home) / "lockin_fast") / "triton.json"


def measured(op, h, latents, own, others, trial):
    """The fastest of `own` and `others` for this op, dtype, width, GPU and size (to a factor of two); else `own`.

    `trial` launches once with a configuration and may be called any number of times.
    """
    name = gpu_name(h.device) if WANTED else None
    if name is None:
        return own
    key = "|".join(
        (op, str(h.dtype), f"tokens<={_class(h.shape[0])}", f"d={h.shape[1]}", f"latents<={_class(latents)}",
         name, f"triton {triton.__version__}")
    )  # fmt: skip
    known = results()
    found = known.get(key)
    if not isinstance(found, dict) or found.keys() != own.keys():
        found = known[key] = fastest([own, *others], trial)
        store(key, found)
    return found


def gpu_name(device):
    """The name of the GPU that is `device`; None where kernels do not really run."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def fastest(configs, trial):
    """The quickest of the configurations that run at all; ones that need more than the chip has are passed over."""
    best, least = configs[0], float("inf")
    for config in configs:
        try:
            time = triton.testing.do_bench(lambda config=config: trial(config), warmup=10, rep=50, return_mode="median")
        except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError):
            continue
        if time < least:
            best, least = config, time
    return best


@cache
def results():
    """The file's results, read once a process, and those measured since."""
    return read()


def read():
    """What the file holds; nothing when there is none or it is not ours to understand."""
    try:
        found = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def store(key, config):
    """Add one result to the file, which is replaced as a whole: readers see the old one or the new one."""
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(read() | {key: config}, file, indent=1)
    os.replace(file.name, path)


def _class(size):
    return triton.next_power_of_2(max(size, 1))
