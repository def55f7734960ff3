"""Parts and unions of latent sets, which a sweep compares under names of their own."""

import dataclasses
from collections.abc import Iterable, Mapping

from lockin_fast.blocking.latents import LatentSet
from lockin_fast.sweep_settings import Side, SweepSettings
from lockin_fast.typed_mapping import ConfigError

SHUFFLE_SEED = 0


@dataclasses.dataclass(frozen=True)
class Variant:
    """What is blocked of one or several named sets: their union, of that the `size` best, of those one side.

    side: "both"; "positive" or "negative", those that may not rise or fall alone; "shuffled", all of them with their
    signs dealt out anew (by a fixed seed), as many of each as before.
    """

    sets: tuple[str, ...]
    size: int | None = None
    side: Side = "both"

    def of(self, sets: Mapping[str, LatentSet]) -> LatentSet:
        """The variant's latents. Raises ValueError where the sets have too few of them, or none on that side."""
        first, *others = (sets[name] for name in self.sets)
        for other in others:
            first = first.union(other)
        if self.size is not None:
            first = first.take(self.size)
        if self.side == "shuffled":
            return first.shuffled(SHUFFLE_SEED)
        return first if self.side == "both" else first.only(self.side)


def variants(sweep: SweepSettings, sets: Iterable[str]) -> dict[str, Variant]:
    """{label: variant} of every named set and union x size x side, in that order; the label names a trial.

    Raises ConfigError for a union of unknown sets, or where two variants would have one label.
    """
    named = {name: (name,) for name in sets}
    sets = set(named)
    for name, members in sweep.unions.items():
        if not set(members) <= sets or len(set(members)) < 2:
            known = ", ".join(sorted(sets))
            raise ConfigError(f"sweep.unions.{name}: got {list(members)}, expected two or more of {known}")
        if name in named:
            raise ConfigError(f"sweep.unions.{name}: a latent set has that name already")
        named[name] = members
    found: dict[str, Variant] = {}
    for name, members in named.items():
        for size in sweep.sizes:
            for side in sweep.sides:
                parts = (name, "" if size is None else f"k{size}", "" if side == "both" else side)
                label = "-".join(filter(None, parts))
                if label in found:
                    raise ConfigError(f"sweep.latents: two latent sets would be called {label}; rename one")
                found[label] = Variant(members, size, side)
    return found
