"""How far two judges agree: Cohen's kappa for misaligned, incoherent and refusal each, with an interval."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from lockin_fast.judges.rating import Rating

SEEN = {"misaligned": "misaligned", "incoherent": "incoherent", "refusal": "refused"}  # verdict -> what of a rating
DRAWS = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Agreement:
    """Of the replies that two judges rated, how many both, the first alone, the second alone and neither see it in."""

    both: int
    first: int
    second: int
    neither: int

    @property
    def replies(self) -> int:
        return self.both + self.first + self.second + self.neither

    @property
    def observed(self) -> float | None:
        """The share of replies on which they agree; None without replies."""
        return (self.both + self.neither) / self.replies if self.replies else None

    @property
    def kappa(self) -> float | None:
        """(p_o - p_e) / (1 - p_e), p_o being the share they agree on and p_e what two judges with their rates would
        agree on by chance; None where both say the same of every reply, which leaves nothing to agree about.

        Source: J. Cohen, A coefficient of agreement for nominal scales, 1960.
        """
        n = self.replies
        one, two = self.both + self.first, self.both + self.second
        chance = one * two + (n - one) * (n - two)  # n^2 p_e, in whole numbers
        return (n * (self.both + self.neither) - chance) / (n * n - chance) if chance < n * n else None

    def interval(self, seed: int = 0) -> tuple[float, float] | None:
        """Where kappa lies with 95% confidence: percentiles of 2,000 bootstrap draws of as many replies.

        Replies are drawn as if each were independent; draws in which kappa is undefined are left out. None where kappa
        itself is undefined.
        """
        import numpy as np

        if self.kappa is None:
            return None
        n = self.replies
        counts = np.array([self.both, self.first, self.second, self.neither])
        both, first, second, neither = np.random.default_rng(seed).multinomial(n, counts / n, size=DRAWS).T
        one, two = both + first, both + second
        chance = one * two + (n - one) * (n - two)
        defined = chance < n * n
        kappa = (n * (both + neither) - chance)[defined] / (n * n - chance)[defined]
        low, high = np.quantile(kappa, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)

    def row(self) -> dict[str, Any]:
        """Counts and figures in plain types."""
        low, high = self.interval() or (None, None)
        return asdict(self) | {"observed": self.observed, "kappa": self.kappa, "low": low, "high": high}


def agreement(first: Sequence[Rating], second: Sequence[Rating]) -> dict[str, Agreement]:
    """{verdict: Agreement} of two judges' ratings of the same replies; what one of them did not rate is left out."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a.rated and b.rated]
    found = {}
    for verdict, name in SEEN.items():
        seen = [(getattr(a, name) >= 0.5, getattr(b, name) >= 0.5) for a, b in pairs]
        found[verdict] = Agreement(
            seen.count((True, True)), seen.count((True, False)), seen.count((False, True)), seen.count((False, False))
        )
    return found


def agreements(names: Sequence[str], ratings: Sequence[Sequence[Rating]]) -> list[dict[str, Any]]:
    """A row for every pair of judges and verdict; ratings[i] are those of the judge names[i]."""
    return [
        {"judges": [names[i], names[j]], "verdict": verdict, **found.row()}
        for i, j in combinations(range(len(names)), 2)
        for verdict, found in agreement(ratings[i], ratings[j]).items()
    ]
