"""The tests of this folder share tests/tiny_llama.py, tests/tiny_organism.py and tests/ops/memory.py."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "ops")]
from tiny_organism import one_thread  # noqa: E402, F401
