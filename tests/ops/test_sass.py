"""The criterion for spills, on machine code written by hand."""

import pytest
from sass import spills


def code(*lines):
    """Instructions with addresses, as nvdisasm prints them; a line that ends in a colon is a label."""
    text = [line if line.endswith(":") else f"        /*{i * 16:04x}*/   {line} ;" for i, line in enumerate(lines)]
    return "\n".join(["        .global         a_kernel", "a_kernel:", ".text.a_kernel:", *text])


STORE, LOAD = "STL [R1], R0", "LDL.LU R0, [R1]"
LOOP = ".L_x_0:", "FADD R2, R2, R3", "@P0 BRA `(.L_x_0)"
OUTER = ".L_x_1:", "FADD R4, R4, R5", *LOOP, "@P1 BRA `(.L_x_1)"
SKIP = "@P0 BRA `(.L_x_2)", STORE, LOAD, ".L_x_2:"
HELPER, RETURN = ("$helper$sqrt:", "FMUL R8, R8, R8"), "RET.REL.NODEC R2 `(a_kernel)"


@pytest.mark.parametrize(
    ("lines", "inside", "outside"),
    [
        ((*LOOP, "EXIT"), 0, 0),
        ((STORE, *LOOP, LOAD, "EXIT"), 0, 2),
        ((*LOOP[:2], STORE, LOAD, LOOP[2], "EXIT"), 2, 0),
        ((STORE, *LOOP[:2], LOAD, LOOP[2], "EXIT"), 1, 1),
        ((*LOOP[:1], STORE, *LOOP[1:], LOAD, "EXIT"), 1, 1),
        ((*OUTER[:2], STORE, *OUTER[2:5], LOAD, OUTER[5], "EXIT"), 2, 0),
        ((*OUTER[:3], STORE, *OUTER[3:], LOAD, "EXIT"), 1, 1),
        ((STORE, *OUTER, LOAD, "EXIT"), 0, 2),
        ((*SKIP, "EXIT"), 0, 2),
        (("BSSY B0, `(.L_x_2)", *SKIP, "EXIT"), 0, 2),
        (("EXIT", ".L_x_9:", "BRA `(.L_x_9)"), 0, 0),
        ((STORE, "EXIT", ".L_x_9:", "BRA.U `(.L_x_9)"), 0, 1),
        ((LOOP[0], STORE, "@!P5 CALL.REL.NOINC `(.L_x_3)", LOOP[2], ".L_x_3:", LOAD, "EXIT"), 1, 1),
        ((LOOP[0], "BRA `(.L_x_4)", ".L_x_5:", LOOP[2], "EXIT", ".L_x_4:", STORE, "BRA `(.L_x_5)"), 1, 0),
        (("@P0 BRA `(.L_x_0)", ".L_x_7:", STORE, LOAD, "EXIT", *LOOP, "BRA `(.L_x_7)"), 0, 2),
        ((STORE, "CALL.REL.NOINC `($helper$sqrt)", LOAD, "EXIT", *HELPER, "STL.64 [R1], R2", RETURN), 1, 2),
        ((STORE, "CALL.REL.NOINC `($helper$sqrt)", LOAD, "EXIT", *HELPER, RETURN), 0, 2),
        ((STORE, "BRX R2 -0x10", LOAD, "EXIT"), 2, 0),
        ((STORE, "CALL.ABS.NOINC R2", LOAD, "EXIT"), 2, 0),
        (("STS [R1], R0", "LDS R0, [R1]", "LDG.E R0, [R2.64]", "EXIT"), 0, 0),
    ],
    ids=[
        "none", "around a loop", "in a loop", "load in a loop", "store in a loop", "in the outer loop", "in the inner",
        "around both", "in a branch", "in a region that joins", "padding", "before padding", "loop left by a call",
        "in a part of the loop moved behind it", "after a wait moved behind it", "in a function", "around a call",
        "computed jump", "computed call", "shared and global",
    ],
)  # fmt: skip
def test_spills_are_sorted_by_whether_a_loop_repeats_them(lines, inside, outside):
    assert tuple(map(len, spills(code(*lines)))) == (inside, outside)
