"""How a list of faults is written down."""

QUICK = "not (scratch or compiles or graph or opcheck)"


def faults(file, tests, *pairs, isa=""):
    """One fault of `file` for each pair of what is replaced and by what; tests/`tests`.py have to notice."""
    return [(file, old, new, f"tests/{tests}.py", QUICK, isa) for old, new in pairs]
