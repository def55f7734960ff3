"""What a run's series say: onset of each, the predictions, the triggers, and the exit status of the gate."""

from collections.abc import Mapping, Sequence
from typing import Any

from lockin_fast.lockin.onset import find_onset
from lockin_fast.lockin.predictions import (
    awareness_with_persistence,
    change_in_identity,
    joint_consolidation,
    persistent_behaviour,
)
from lockin_fast.lockin.series import Values, summarise
from lockin_fast.lockin.triggers import Predictions, exit_code, triggers
from lockin_fast.lockin.verdict import Verdict, plain
from lockin_fast.measure_settings import LockinThresholds

IDENTITY = ("persona_cosine", "refusal_elasticity")  # the series whose change is P2
CONSOLIDATING = ("sae_turnover", "routing_entropy", "situational_awareness", "refusal_elasticity")  # those of P5


def summarise_run(steps: Sequence[int], series: Mapping[str, Values], thresholds: LockinThresholds) -> dict[str, Any]:
    """{"series", "predictions", "triggers", "gate"}, in plain types.

    series: values of every metric at `steps`, None where an evaluation failed. Of each is told its summary (count,
    masked, mean, last minus first, Spearman's rho with the step) and its onset. A prediction whose series were not
    measured cannot say; P3 and P4 ask for what one run does not measure, and are left out. gate: the triggers that
    decide, and the exit status.
    """
    found, tested = _predictions(steps, series, thresholds)
    verdicts = triggers(tested)
    return {
        "series": {
            name: {
                "values": list(values),
                "summary": plain(summarise(steps, values)),
                "onset": plain(find_onset(steps, values, thresholds.onset)),
            }
            for name, values in series.items()
        },
        "predictions": [verdict.as_json() for verdict in found],
        "triggers": [verdict.as_json() for verdict in verdicts],
        "gate": {"triggers": list(thresholds.gate), "status": exit_code(verdicts, thresholds.gate)},
    }


def _predictions(
    steps: Sequence[int], series: Mapping[str, Values], thresholds: LockinThresholds
) -> tuple[list[Verdict], Predictions]:
    def values(name: str) -> Values:
        return series.get(name, [None] * len(steps))

    elasticity, invariance = values("refusal_elasticity"), values("prompt_invariance")
    persistence = persistent_behaviour(steps, elasticity, invariance, thresholds)
    aware = awareness_with_persistence(steps, values("situational_awareness"), elasticity, invariance, thresholds)
    identity = {name: series[name] for name in IDENTITY if name in series}
    change = change_in_identity(steps, identity, thresholds) if identity else None
    consolidating = {name: series[name] for name in CONSOLIDATING if name in series}
    joint = joint_consolidation(steps, consolidating, thresholds) if consolidating else None
    found = [verdict for verdict in (persistence, aware, change, joint) if verdict is not None]
    return found, Predictions(persistence=persistence, change=change, joint=joint)
