"""Whether the sites that mediate a behaviour stay the same from one checkpoint to another."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lockin_fast.lockin.series import spearman
from lockin_fast.patching.sites import Site

EFFECTS = ("change", "recovery", "attribution")
"""Of a site in patching.json: the change of the logit difference in nats, its share, and its estimate by gradients."""
TOP = 10

Effects = Mapping[Site, float | None]
"""The effect of patching each site; None or NaN is one that was not measured."""


class MediatorStability(NamedTuple):
    """How the effects of one direction and component agree between two checkpoints."""

    rank_correlation: float | None  # Spearman's rho, None below three sites or where a side is constant
    p: float | None  # of the rank correlation, two-sided
    overlap: float | None  # |both tops| / top, None where no more than `top` sites are left
    chance: float | None  # the overlap that two random choices have on average, top / sites
    p_overlap: float | None  # share of random choices with at least this overlap
    sites: int  # measured in both
    masked: int  # measured in one of them at most


def read_effects(path: str | Path, effect: str = "change") -> dict[Site, float | None]:
    """The effect of patching each site, from the patching.json that `lockin-fast patch` wrote; null stays None.

    Raises ValueError, naming the file, for an unknown effect, for a file that is not such a result, for a site listed
    twice, and where no site has the effect (attribution may have been switched off); FileNotFoundError without a file.
    """
    if effect not in EFFECTS:
        raise ValueError(f"effect: got {effect!r}, expected one of {', '.join(EFFECTS)}")
    path = Path(path)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["sites"]
        found = [(_site(row), row[effect]) for row in rows]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not the patching.json of `lockin-fast patch` ({type(error).__name__}: {error}); patch the "
            "checkpoint again"
        ) from None
    effects = dict(found)
    if len(effects) < len(found):
        raise ValueError(f"{path}: lists a site twice; patch the checkpoint again")
    if all(value is None for value in effects.values()):
        raise ValueError(f"{path}: no site has {effect!r}; measure it, or choose another of {', '.join(EFFECTS)}")
    return effects


def _site(row: Mapping[str, Any]) -> Site:
    return Site(row["direction"], row["component"], row["layer"], row["positions"], row["head"])


def mediator_stability(
    before: Effects, after: Effects, *, top: int = TOP
) -> dict[tuple[str, str], MediatorStability]:
    """Rank correlation and top-n overlap of patching effects per site, for each direction and component.

        rank_correlation = Spearman's rho over the sites of the effects before and after
        overlap          = |T_before and T_after| / top,  T: the `top` sites with the largest |effect|

    Apart by direction and component: repairing lowers what inducing raises, and a whole layer does more than a head,
    so that pooled ranks would agree whatever the sites do. Sites not measured on both sides are left out and counted;
    of equal effects the earlier site (by layer, positions, head) is the larger. p_overlap is hypergeometric; both p
    values take sites to be exchangeable, which neighbours are not quite.

    Returns {(direction, component): MediatorStability} of all that either side has. Raises ValueError for a top below
    1, an infinite effect, and where no site was measured on both sides. Needs scipy. Source: ours.
    """
    if top < 1:
        raise ValueError(f"top: got {top}, expected at least 1")
    groups: dict[tuple[str, str], list[Site]] = {}
    for site in sorted(before.keys() | after.keys(), key=_order):
        groups.setdefault((site.direction, site.component), []).append(site)
    found = {
        group: _stability([(before.get(site), after.get(site)) for site in sites], top)
        for group, sites in groups.items()
    }
    if not any(stability.sites for stability in found.values()):
        raise ValueError(
            f"before, after: of {len(before)} and {len(after)} sites none was measured in both; patch both checkpoints "
            "with the same directions, components, layers and positions"
        )
    return found


def _order(site: Site) -> tuple:
    return site.direction, site.component, site.layer, site.positions, -1 if site.head is None else site.head


def _stability(pairs: list[tuple[float | None, float | None]], top: int) -> MediatorStability:
    from scipy import stats

    ranks = spearman(*zip(*pairs, strict=True))
    there = [pair for pair in pairs if not any(value is None or math.isnan(value) for value in pair)]
    if len(there) <= top:
        return MediatorStability(ranks.rho, ranks.p, None, None, None, ranks.n, ranks.masked)
    shared = len(set.intersection(*(_top(side, top) for side in zip(*there, strict=True))))
    p_overlap = float(stats.hypergeom.sf(shared - 1, len(there), top, top))
    return MediatorStability(
        ranks.rho, ranks.p, shared / top, top / len(there), p_overlap, ranks.n, ranks.masked
    )


def _top(effects: Sequence[float], count: int) -> set[int]:
    """Where the largest effects are, by size; of equal ones the first."""
    return set(sorted(range(len(effects)), key=lambda i: -abs(effects[i]))[:count])
