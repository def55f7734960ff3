"""The tests of this folder share tests/tiny_llama.py, and steered requests with what plain forwards answer to them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_organism import one_thread  # noqa: E402, F401
