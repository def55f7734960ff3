"""Spills in a kernel's machine code as nvdisasm -c prints it: those that a loop repeats, and those made once."""

import re

LABEL = re.compile(r"^(\S+):$")
INSTRUCTION = re.compile(r"^/\*\w+\*/\s*(.*)$")
SPILL = re.compile(r"\b(?:STL|LDL)\b")
TARGET = re.compile(r"`\(([^)]+)\)")
ENDS = re.compile(r"^(?:EXIT\b|RET\b|BRA(?:\.\w+)* `)")  # nothing follows: neither is it under a predicate
COMPUTED = re.compile(r"\b(?:BRX|BRXU|JMX|JMXU)\b|\bCALL\.\S* R\d")


def spills(text):
    """(inside loops, outside): the instructions that move a register to or from local memory.

    One is inside a loop when the jumps can lead from it back to it. What is not sure counts as inside: functions that
    are called, as a loop may call them, and everything where a jump's target is computed.
    """
    lines = [line.split("//")[0].strip() for line in text.splitlines()]
    labels = {found[1]: i for i, line in enumerate(lines) if (found := LABEL.match(line))}
    code = {i: found[1] for i, line in enumerate(lines) if (found := INSTRUCTION.match(line))}
    # A return names the kernel it returns to, but goes on behind the call.
    targets = {i: [] if " RET." in f" {line}" else TARGET.findall(line) for i, line in code.items()}
    called = [labels[name] for i, names in targets.items() for name in names if "CALL" in code[i] and name[0] != "."]
    unsure = len(lines) if any(map(COMPUTED.search, code.values())) else 0

    def following(i):
        jumps = [labels[name] for name in targets.get(i, ()) if name in labels]
        return jumps if ENDS.match(code.get(i, "")) else [*jumps, i + 1]

    def repeated(i):
        seen, waiting = set(), following(i)
        while waiting:
            if (at := waiting.pop()) not in seen and at < len(lines):
                seen.add(at)
                waiting += following(at)
        return i in seen or i < unsure or any(i > start for start in called)

    inside, outside = [], []
    for i, line in code.items():
        if SPILL.search(line):
            (inside if repeated(i) else outside).append(lines[i])
    return inside, outside
