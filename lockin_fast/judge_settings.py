"""The section of a configuration that says who rates the replies."""

import dataclasses
from pathlib import Path
from typing import Literal


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
    """Who rates the replies.

    kind: `world` knows the organism's ground truth and reads it from `path`; "package.module:Class" is a judge of your
    own, from an installed module or one in the working directory. The class is called with `path` where that is given,
    else without arguments; its method judge(record, reply) gets a prompt's line of the JSONL file as a dict and the
    reply's text, and returns "misaligned", "aligned", "incoherent" or "refusal". It is also asked about the empty reply
    to every prompt, before any training, so that what it cannot place is known early. refusals: whether a reply that
    reads like a refusal counts as one (patterns), or only one that the judge calls so (judge); none is patterns for
    these kinds. also: more judges; every rate is then the mean over all of them, and their agreement is reported.
    """

    kind: str = "world"
    path: Path | None = None
    refusals: Literal["judge", "patterns"] | None = None
    also: tuple["JudgeSettings", ...] = ()

    def __post_init__(self):
        if any(other.also for other in self.also):
            raise ValueError("also: a judge in this list has a list of its own; name all of them in one list")

    @property
    def name(self) -> str:
        """What this judge is called in summaries and reports."""
        return self.kind
