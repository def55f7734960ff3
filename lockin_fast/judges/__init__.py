"""Who says whether a reply is misaligned, incoherent or a refusal: one judge, or several whose ratings are averaged."""

from lockin_fast.judges.load import KINDS, judge_files, load_judge
from lockin_fast.judges.panel import Panel
from lockin_fast.judges.rating import UNRATED, VERDICTS, Judge, JudgeError, Rating, Verdict, average, rate
from lockin_fast.judges.refusals import is_refusal

__all__ = [
    "KINDS", "UNRATED", "VERDICTS", "Judge", "JudgeError", "Panel", "Rating", "Verdict", "average", "is_refusal",
    "judge_files", "load_judge", "rate",
]  # fmt: skip
