"""How far the resident memory of a process of its own rises while it runs some code. Linux only."""

import os
import subprocess
import sys

PRELUDE = """
import sys, torch, lockin_fast
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) / 1024
def rise(call):
    open("/proc/self/clear_refs", "w").write("5")  # resets the high-water mark
    before = peak()
    result = call()
    return result, peak() - before
"""


def printed(code, *arguments, **environment):
    """The words printed by `code`, which has `rise(call) -> (result, MB)` at hand, in a new process."""
    command = [sys.executable, "-c", PRELUDE + code, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()
