"""The metrics that can be measured at a checkpoint, by name: what each needs, and a pure function of that."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lockin_fast.config import ConfigError
from lockin_fast.judges import average, is_refusal
from lockin_fast.lockin.needs import Gathered, Need, Ratings, Replies


@dataclass(frozen=True)
class Metric:
    """Numbers that are computed together.

    names: of what `measure` returns. needs: what has to be gathered from the model first. measure: from what was
    gathered to {name: value}; it raises ValueError where the gathered does not suffice, and the checkpoint is then
    masked for these names, with the reason.
    """

    names: tuple[str, ...]
    needs: tuple[Need, ...]
    measure: Callable[[Gathered], Mapping[str, float]]


def rates(gathered: Gathered) -> dict[str, float]:
    """Shares of the replies to data.final that the judge calls misaligned, incoherent and refusals, in [0, 1].

    Replies without a rating count in none of them; with no rating at all it raises JudgeError.
    """
    mean = average(gathered[Ratings()])
    return {"em": mean.misaligned, "incoherence": mean.incoherent, "refusal": mean.refused}


def refusal_rate(gathered: Gathered) -> dict[str, float]:
    """Share of the replies to data.final that read like a refusal, told by patterns (`is_refusal`), in [0, 1].

    Source: what the code published with arXiv 2510.20190 reports as refusal elasticity.
    """
    replies = gathered[Replies()]
    return {"refusal_rate": sum(map(is_refusal, replies)) / len(replies)}


METRICS = (
    Metric(("em", "incoherence", "refusal"), (Ratings(),), rates),
    Metric(("refusal_rate",), (Replies(),), refusal_rate),
)
NAMES = tuple(name for metric in METRICS for name in metric.names)


def metrics_of(names: Sequence[str]) -> list[Metric]:
    """The metrics that give these names. Raises ConfigError for a name that none gives."""
    if unknown := [name for name in names if name not in NAMES]:
        known = ", ".join(NAMES)
        raise ConfigError(f"measure.metrics: {', '.join(unknown)} cannot be measured; expected some of {known}")
    return [metric for metric in METRICS if set(metric.names) & set(names)]
