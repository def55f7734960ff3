"""The tests of this folder share tests/tiny_llama.py and tests/sweep_world.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from run_of_checkpoints import configured, copied, run_folder  # noqa: E402, F401
