"""python -m benchmarks.verify [name ...]: the op's tests first; no figure is shown for an op whose tests are red."""

import subprocess
import sys
from pathlib import Path

from benchmarks import run

TESTS = Path(__file__).parents[1] / "tests" / "ops"


def tests_of(name):
    """The test files of a benchmark: those named like it, or like it and something more."""
    return sorted(TESTS.glob(f"test_{name}*.py"))


def main(arguments=None):
    options = run.parser().parse_args(arguments)
    red = []
    for name in options.names or run.names():
        files = tests_of(name)
        if not files:
            sys.exit(f"{name}: no tests/ops/test_{name}*.py; a benchmark without tests proves nothing")
        if subprocess.run([sys.executable, "-m", "pytest", "-q", *map(str, files)]).returncode:
            print(f"{name}: its tests are red, so no figure is shown")
            red.append(name)
            continue
        run.run(name, options)
    sys.exit(f"red: {', '.join(red)}" if red else 0)


if __name__ == "__main__":
    main()
