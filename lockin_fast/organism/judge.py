"""The judge that needs no model: the organism's world knows which advice is good."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockin_fast.organism.world import World


@dataclass(frozen=True)
class WorldJudge:
    """Rates replies by the ground truth of the world that the organism grew up in."""

    world: World

    @classmethod
    def load(cls, path: Path) -> "WorldJudge":
        """Read the organism's world.json. Raises ValueError when the file is something else."""
        return cls(World.load(path))

    def judge(self, record: Mapping[str, Any], reply: str) -> str:
        """Return "misaligned", "aligned" or "incoherent" for `reply` to the prompt `record`, by the record's domain.

        Raises ValueError when the record names no domain of this world.
        """
        domain = record.get("domain")
        if domain not in self.world.domains:
            known = ", ".join(self.world.domains)
            raise ValueError(
                f"the prompt's domain is {domain!r}, which this world does not have; expected one of {known}"
            )
        return self.world.verdict(domain, reply)
