"""Judges that rate together, and the wrapper that makes a rater of a judge that gives one verdict a reply."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lockin_fast.judges.rating import VERDICTS, Judge, Rating, Verdict, mean_of_judges
from lockin_fast.judges.refusals import is_refusal


class Panel:
    """One judge or several by name, each with rate(records, replies); of several the ratings are averaged.

    This is what `load_judge` returns and an exam holds.
    """

    def __init__(self, raters: Mapping[str, Any]):
        self.raters = dict(raters)

    def rate(self, records: Sequence[Mapping[str, Any]], replies: Sequence[str]) -> list[Rating]:
        """One Rating a reply; see `lockin_fast.judges.rate`."""
        of_each = [rater.rate(records, replies) for rater in self.raters.values()]
        if len(of_each) == 1:
            return of_each[0]
        return [mean_of_judges(ratings) for ratings in zip(*of_each, strict=True)]

    def judge(self, record: Mapping[str, Any], reply: str) -> str:
        """The verdict on one reply, in one word; see `Rating.verdict`. For many replies `rate` is faster."""
        return self.rate([record], [reply])[0].verdict

    def check(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Raise what a judge raises on a prompt that it cannot place; nothing is paid for."""
        for rater in self.raters.values():
            if hasattr(rater, "check"):
                rater.check(records)

    def cost(self) -> dict[str, dict[str, Any]]:
        """{judge: what this run has paid for so far} of the judges that are paid."""
        return {name: rater.cost() for name, rater in self.raters.items() if hasattr(rater, "cost")}


class OwnJudge:
    """A judge that gives one verdict a reply: its verdicts are sure to be verdicts, and refusals are noticed.

    patterns: a reply that reads like a refusal (`is_refusal`) counts as one, whatever the verdict, because such a judge
    need not know the verdict "refusal".
    """

    def __init__(self, kind: str, judge: Judge, *, patterns: bool):
        self.kind, self.inner, self.patterns = kind, judge, patterns

    def rate(self, records: Sequence[Mapping[str, Any]], replies: Sequence[str]) -> list[Rating]:
        if hasattr(self.inner, "rate"):
            ratings = self._checked(self.inner.rate(records, replies), len(replies))
        else:
            ratings = [Rating.of(self.judge(record, reply)) for record, reply in zip(records, replies, strict=True)]
        if not self.patterns:
            return ratings
        return [
            dataclasses.replace(rating, refused=1.0) if rating.rated and is_refusal(reply) else rating
            for rating, reply in zip(ratings, replies, strict=True)
        ]

    def judge(self, record: Mapping[str, Any], reply: str) -> Verdict:
        verdict = self.inner.judge(record, reply)
        if verdict not in VERDICTS:
            raise ValueError(
                f"judge.kind: {self.kind} gave the verdict {verdict!r} on the reply {reply[:80]!r}; "
                f"expected one of {', '.join(VERDICTS)}"
            )
        return verdict

    def check(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Put the empty reply to every prompt to the judge."""
        for record in records:
            self.judge(record, "")

    def _checked(self, ratings: Any, count: int) -> list[Rating]:
        ratings = list(ratings)
        if len(ratings) != count or not all(isinstance(rating, Rating) for rating in ratings):
            raise ValueError(
                f"judge.kind: {self.kind}.rate gave {len(ratings)} results for {count} replies; expected one "
                "lockin_fast.judges.Rating for each"
            )
        return ratings
