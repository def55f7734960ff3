"""What metrics ask for: each need is met once for a checkpoint, whatever the number of metrics that share it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Replies:
    """list[str]: a reply to every prompt of the set."""

    prompts: str = "final"


@dataclass(frozen=True)
class Ratings:
    """list[Rating]: what the judge sees in each of these replies."""

    prompts: str = "final"


Need = Replies | Ratings
Gathered = Mapping[Need, Any]
