"""How long work reports where it stands, without knowing who watches."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called as progress(stage, done, total): with done=0 when a stage begins, with done == total when it has ended."""


def silent(stage: str, done: int, total: int) -> None:
    """The progress of work that nobody watches."""
