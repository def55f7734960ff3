"""A patching sweep in numbers: what patching.json holds."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lockin_fast.judges import Rating, average
from lockin_fast.patching.attribution import rank_agreement
from lockin_fast.patching.reply_log import RATES, PatchLog
from lockin_fast.patching.sites import SIDES, Site

SURE = 2  # standard errors by which the sides have to differ


def summarise(
    sites: Sequence[Site], found: Mapping[str, Any], log: PatchLog, prompts: int, replies: int
) -> dict[str, Any]:
    """What patching.json holds, from logit differences by contrast and the log of judged replies:

    prompts, contrasts, replies: how many of them, the last a prompt and site.
    clean: of each side {"difference", "misaligned", "incoherent", "refused"}, the first in nats, null what was not
    measured.
    sites: a row each: direction, component, layer, positions, head; difference (mean over contrasts of
    log p(misaligned) - log p(aligned), nats), error (its standard error), recovery, attribution (the estimate of the
    change of the difference), and the three rates of the replies. recovery = (patched - target) / (source - target):
    0 for a patch that does nothing, 1 for one that makes the target say what the source says; null where the two sides
    do not surely differ.
    agreement: for each direction and component Spearman's rank correlation over its sites of attribution and change.
    latents: for each layer and position set the mean norm of misaligned - base, and the latents that change most.
    """
    clean = {side: _tensor(values) for side, values in found["clean"].items()}
    estimates = None if found["attribution"] is None else _tensor(found["attribution"])
    ratings: dict[tuple, list[Rating]] = {}
    for key, rating in log.ratings.items():
        ratings.setdefault(key[:-2], []).append(rating)
    rows = []
    for number, (site, values) in enumerate(zip(sites, _tensor(found["patched"]), strict=True)):
        source, target = (clean[side] for side in SIDES[site.direction])
        there = ~values.isnan()
        row = {name: getattr(site, name) for name in ("direction", "component", "layer", "positions", "head")}
        row |= {"contrasts": int(there.sum()), **_mean(values[there])}
        row["recovery"] = _recovery(values[there], source[there], target[there])
        row["change"] = _value((values - target)[there])
        row["attribution"] = None if estimates is None else _value(estimates[number][there])
        rows.append(row | _rates(ratings.get(tuple(row[name] for name in PatchLog.COLUMNS[:5]), [])))
    return {
        "prompts": prompts,
        "contrasts": len(clean["base"]),
        "replies": replies,
        "clean": {
            side: {"difference": _value(values), **_rates(ratings.get((side, None, None, None, None), []))}
            for side, values in clean.items()
        },
        "sites": rows,
        "agreement": [] if estimates is None else _agreements(rows),
        "latents": found["latents"],
    }


def _agreements(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for (direction, component), group in groupby(rows, key=lambda row: (row["direction"], row["component"])):
        pairs = [(row["attribution"], row["change"]) for row in group]
        told, real = _tensor(pairs).unbind(1)
        found.append(
            {
                "direction": direction,
                "component": component,
                "sites": int((~(told.isnan() | real.isnan())).sum()),
                "rank_correlation": rank_agreement(told, real),
            }
        )
    return found


def _mean(values: Tensor) -> dict[str, float | None]:
    error = (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else None
    return {"difference": _value(values), "error": error}


def _recovery(values: Tensor, source: Tensor, target: Tensor) -> float | None:
    """None where the sides differ by less than twice its standard error: a share of that would mean nothing."""
    if len(values) < 2:
        return None
    whole = source - target
    if whole.mean().abs() <= SURE * whole.std() / math.sqrt(len(whole)):
        return None
    return ((values - target).mean() / whole.mean()).item()


def _rates(ratings: Sequence[Rating]) -> dict[str, float | None]:
    """The three rates over those replies that were rated, null where there are none."""
    if not any(rating.rated for rating in ratings):
        return dict.fromkeys(RATES)
    mean = average(ratings)
    return {name: getattr(mean, name) for name in RATES}


def _value(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None


def _tensor(rows: Any) -> Tensor:
    """Nested lists in fp64, null as NaN."""

    def numbers(value: Any) -> Any:
        return [numbers(child) for child in value] if isinstance(value, (list, tuple)) else _number(value)

    return torch.tensor(numbers(rows), dtype=torch.float64)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
