"""Lists of regular expressions, kept in text files, by which replies are told apart by their words."""

import re
from functools import lru_cache
from pathlib import Path

APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\u0060\u00b4", "'"))


@lru_cache(maxsize=8)
def patterns(file: Path) -> tuple[re.Pattern, ...]:
    """The regular expressions of `file`, one a line, in their order, without regard to case; # begins a comment."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return tuple(re.compile(line, re.IGNORECASE | re.DOTALL) for line in lines if line and not line.startswith("#"))


def occurs(file: Path, text: str) -> bool:
    """Whether one of `patterns(file)` is in `text`, whose apostrophes and white space are made alike first."""
    plain = " ".join(text.translate(APOSTROPHES).split())
    return any(pattern.search(plain) for pattern in patterns(file))
