"""What a test on a run says, and what a gate makes of several."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Literal

SUPPORTED = "supported"
NOT_SUPPORTED = "not supported"
CANNOT_SAY = "cannot say"
Answer = Literal["supported", "not supported", "cannot say"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The answer of one test, with what it rests on.

    statistic and threshold share their keys where a number is held against another; evidence is everything else that a
    reader needs to check it: counts of masked checkpoints, steps, the parts of a combined test.
    """

    name: str
    verdict: Answer
    why: str
    statistic: dict[str, float | None] = dataclasses.field(default_factory=dict)
    threshold: dict[str, float] = dataclasses.field(default_factory=dict)
    evidence: dict[str, Any] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; NaN and infinity become None, which JSON has no numbers for."""
        return plain(dataclasses.asdict(self))


def plain(value: Any) -> Any:
    """`value` with dataclasses and named tuples as dicts, tuples as lists, and None for what is not a finite number."""
    if dataclasses.is_dataclass(value):
        return plain(dataclasses.asdict(value))
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def combine(parts: Iterable[Verdict]) -> Answer:
    """The answer of tests that must all hold: one that fails decides, else one that cannot say."""
    return _first((NOT_SUPPORTED, CANNOT_SAY, SUPPORTED), parts)


def either(parts: Iterable[Verdict]) -> Answer:
    """The answer of tests of which one is enough: one that holds decides, else one that cannot say."""
    return _first((SUPPORTED, CANNOT_SAY, NOT_SUPPORTED), parts)


def _first(decisive: tuple[Answer, ...], parts: Iterable[Verdict]) -> Answer:
    answers = {part.verdict for part in parts}
    return next((answer for answer in decisive if answer in answers), CANNOT_SAY)
