"""The build's two steps around nvcc: compile with the assembler's report kept, and gather the reports in one table.

resources.py compile nvcc ... -o OBJECT      OBJECT.ptxas beside it; fails when a kernel spills
resources.py gather TABLE NVCC OBJECT...     one row per kernel and chip, as CSV
"""

import csv
import re
import subprocess
import sys
from pathlib import Path

COLUMNS = ("kernel", "chip", "registers", "shared", "stack", "spill_stores", "spill_loads", "nvcc")
ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<chip>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<spill_stores>\d+) bytes spill stores, (?P<spill_loads>\d+) bytes spill"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def kernels(report):
    """A row per kernel and chip of what `nvcc -Xptxas -v` says, names as the linker sees them."""
    rows = []
    for entry in ENTRY.finditer(report):
        row = entry.groupdict()
        shared = re.search(r"(\d+) bytes smem", row.pop("rest"))
        rows.append(row | {"shared": shared[1] if shared else "0"})
    return rows


def readable(names):
    """Demangled names without their arguments and the project's own namespaces."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    own = re.compile(r"lockin_fast::|\(anonymous namespace\)::|^void ")
    return [own.sub("", line).rpartition("(")[0] for line in done.stdout.splitlines()]


def compile_one(command):
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    report, others = [], []
    for line in done.stderr.splitlines():
        (report if line.startswith("ptxas info") or "bytes stack frame" in line else others).append(line)
    print("\n".join(others), file=sys.stderr, end="\n" if others else "")
    if done.returncode:
        return done.returncode
    target = Path(command[command.index("-o") + 1])
    spilling = [row for row in kernels("\n".join(report)) if row["stack"] != "0" or row["spill_stores"] != "0"]
    for row, name in zip(spilling, readable([row["kernel"] for row in spilling]), strict=True):
        print(f"error: {name} spills to local memory on {row['chip']}: {row}", file=sys.stderr)
    if spilling:
        target.unlink()
        return 1
    target.with_suffix(target.suffix + ".ptxas").write_text("\n".join(report) + "\n")
    return 0


def gather(table, nvcc, objects):
    rows = [row for target in objects for row in kernels(Path(target + ".ptxas").read_text())]
    for row, name in zip(rows, readable([row["kernel"] for row in rows]), strict=True):
        row.update(kernel=name, nvcc=nvcc)
    rows.sort(key=lambda row: (row["kernel"], int(row["chip"].removeprefix("sm_"))))
    with open(table, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    step, *arguments = sys.argv[1:]
    sys.exit(compile_one(arguments) if step == "compile" else gather(arguments[0], arguments[1], arguments[2:]))
