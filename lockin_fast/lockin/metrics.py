"""The metrics that can be measured at a checkpoint, by name: what each needs, and a pure function of that."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lockin_fast.config import ConfigError
from lockin_fast.judges import average
from lockin_fast.lockin.invariance import prompt_invariance
from lockin_fast.lockin.needs import (
    AtBase,
    AtPrevious,
    ClusterLogits,
    Gathered,
    Latents,
    Need,
    Ratings,
    Replies,
    Routing,
    States,
    SteeredReplies,
)
from lockin_fast.lockin.persona import alignment, persona_direction
from lockin_fast.lockin.refusal import by_steering, disclaimer_rate, refusal_elasticity, refusal_rate, refusals
from lockin_fast.lockin.routing_figures import routing_metrics
from lockin_fast.lockin.turnover import latent_turnover


@dataclass(frozen=True)
class Metric:
    """Numbers that are computed together.

    names: of what `measure` returns. needs: what has to be gathered from the model first. measure: from what was
    gathered to {name: value}; it raises ValueError where the gathered does not suffice, and the checkpoint is then
    masked for these names, with the reason; NaN is a value that is not defined there.
    """

    names: tuple[str, ...]
    needs: tuple[Need, ...]
    measure: Callable[[Gathered], Mapping[str, float]]

    @property
    def is_relative(self) -> bool:
        """Whether it compares a checkpoint with the one before it."""
        return any(isinstance(need, AtPrevious) for need in self.needs)


def _rates(gathered: Gathered) -> dict[str, float]:
    mean = average(gathered[Ratings()])
    return {"em": mean.misaligned, "incoherence": mean.incoherent, "refusal": mean.refused}


def _refusal_rate(gathered: Gathered) -> dict[str, float]:
    return {"refusal_rate": refusal_rate(gathered[Replies()]).value}


def _disclaimer_rate(gathered: Gathered) -> dict[str, float]:
    return {"disclaimer_rate": disclaimer_rate(gathered[Replies()]).value}


def _elasticity(gathered: Gathered) -> dict[str, float]:
    steering, replies = zip(*gathered[SteeredReplies()], strict=True)
    probabilities = by_steering(refusals(replies), steering)
    return {"refusal_elasticity": refusal_elasticity(list(probabilities.values())).value}


def _invariance(gathered: Gathered) -> dict[str, float]:
    found = prompt_invariance(gathered[ClusterLogits()])
    return {"prompt_invariance": found.next_token, "prompt_invariance_sequence": found.sequence}


def _persona(gathered: Gathered) -> dict[str, float]:
    """How the shift from the base at the prompts' last tokens lies along the persona direction of the base."""
    positive, negative = (_last(gathered[AtBase(States(side))]) for side in ("positive", "negative"))
    shift = _last(gathered[States()]) - _last(gathered[AtBase(States())])
    found = alignment(persona_direction(positive, negative), shift)
    return {"persona_cosine": float(found.cosine), "persona_projection": float(found.projection)}


def _turnover(gathered: Gathered) -> dict[str, float]:
    before, after = (torch.cat(gathered[need]) for need in (AtPrevious(States()), States()))
    found = latent_turnover(gathered[Latents()], before, after)
    return {
        "sae_turnover": found.by_token,
        "sae_births": float(len(found.births())),
        "sae_deaths": float(len(found.deaths())),
    }


def _routing(gathered: Gathered) -> dict[str, float]:
    return routing_metrics(gathered[Routing()])


def _last(states: Iterable[Tensor]) -> Tensor:
    """fp64 [N, d], of the last token of every prompt."""
    return torch.stack([of_prompt[-1] for of_prompt in states]).double()


METRICS = (
    Metric(("em", "incoherence", "refusal"), (Ratings(),), _rates),
    Metric(("refusal_rate",), (Replies(),), _refusal_rate),
    Metric(("disclaimer_rate",), (Replies(),), _disclaimer_rate),
    Metric(("refusal_elasticity",), (SteeredReplies(),), _elasticity),
    Metric(("prompt_invariance", "prompt_invariance_sequence"), (ClusterLogits(),), _invariance),
    Metric(
        ("persona_cosine", "persona_projection"),
        (States(), AtBase(States()), AtBase(States("positive")), AtBase(States("negative"))),
        _persona,
    ),
    Metric(("sae_turnover", "sae_births", "sae_deaths"), (Latents(), States(), AtPrevious(States())), _turnover),
    Metric(("routing_entropy", "routing_information", "routing_max_load"), (Routing(),), _routing),
)
NAMES = tuple(name for metric in METRICS for name in metric.names)


def metrics_of(names: Sequence[str]) -> list[Metric]:
    """The metrics that give these names. Raises ConfigError for a name that none gives."""
    if unknown := [name for name in names if name not in NAMES]:
        known = ", ".join(NAMES)
        raise ConfigError(f"measure.metrics: {', '.join(unknown)} cannot be measured; expected some of {known}")
    return [metric for metric in METRICS if set(metric.names) & set(names)]
