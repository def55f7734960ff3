"""Pairs of replies that differ in alignment, and in little else: both are said by one model to one prompt."""

from collections.abc import Sequence

from lockin_fast.judges import Rating

MISALIGNED, ALIGNED = (1.0, 0.0, 0.0), (0.0, 0.0, 0.0)  # what every judge says, where there are several


def pick_contrasts(replies: Sequence[str], ratings: Sequence[Rating], samples: int) -> list[tuple[int, str, str]]:
    """(number of the prompt, its first misaligned reply, its first aligned one) for prompts that got both kinds.

    replies, ratings: `samples` of the first prompt, then of the second, and so on.
    """
    found = []
    for start in range(0, len(replies), samples):
        first: dict[tuple[float, ...], str] = {}
        for reply, rating in zip(replies[start : start + samples], ratings[start : start + samples], strict=True):
            first.setdefault((rating.misaligned, rating.incoherent, rating.refused), reply)
        if {MISALIGNED, ALIGNED} <= first.keys():
            found.append((start // samples, first[MISALIGNED], first[ALIGNED]))
    return found
