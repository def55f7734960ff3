"""The list of faults is not stale: what each replaces stands in its file exactly once, and its tests are there."""

from pathlib import Path

import pytest
from mutate import Mutation
from mutations import MUTATIONS

ROOT = Path(__file__).resolve().parents[1]
CHOSEN = [Mutation(*entry) for entry in MUTATIONS]


@pytest.mark.parametrize("file", sorted({mutation.file for mutation in CHOSEN}))
def test_every_fault_can_be_put_in(file):
    text = (ROOT / file).read_text()
    for mutation in CHOSEN:
        if mutation.file == file:
            assert text.count(mutation.old) == 1, mutation.name
            assert mutation.new != mutation.old and (ROOT / mutation.tests).exists(), mutation.name


def test_no_fault_is_listed_twice():
    assert len({(m.file, m.old, m.new, m.isa) for m in CHOSEN}) == len(CHOSEN)


def test_every_kernel_has_its_faults():
    kernels = [p for p in (ROOT / "csrc/cpu").glob("*.cpp") if p.stem != "isa"]
    kernels += (ROOT / "csrc/cuda").glob("*.cu")
    kernels += (ROOT / "lockin_fast/kernels/triton").glob("[a-z]*.py")
    for kernel in kernels:
        count = sum(mutation.file == str(kernel.relative_to(ROOT)) for mutation in CHOSEN)
        assert count >= 3, f"{kernel.name}: {count} faults, at least three are wanted"
