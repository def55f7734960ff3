"""The judged replies of a patching sweep, kept as they are made."""

from collections.abc import Sequence
from typing import Any

from lockin_fast.discovery.kept import ReplyLog
from lockin_fast.judges import Rating
from lockin_fast.patching.replies import Cell
from lockin_fast.patching.sites import Site

RATES = ("misaligned", "incoherent", "refused")


class PatchLog(ReplyLog):
    """A line is {"direction", "component", "layer", "positions", "head", "prompt", "sample", "reply", and the rates}.

    Of an unpatched side its name stands under "direction", and null under what makes a site. prompt: index among those
    that the sweep uses.
    """

    COLUMNS = ("direction", "component", "layer", "positions", "head", "prompt", "sample")
    added = 0

    @staticmethod
    def key(cell: Cell) -> tuple:
        """What the line of a reply is known by."""
        site = cell.site
        if not isinstance(site, Site):
            return site, None, None, None, None, cell.prompt, cell.sample
        return site.direction, site.component, site.layer, site.positions, site.head, cell.prompt, cell.sample

    def keep(self, replies: Sequence[tuple[Cell, str, Rating]]) -> None:
        """Write replies with their ratings and flush them to the disk."""
        rows: list[dict[str, Any]] = []
        for cell, text, rating in replies:
            rates = {name: getattr(rating, name) if rating.rated else None for name in RATES}
            rows.append({**dict(zip(self.COLUMNS, self.key(cell), strict=True)), "reply": text, **rates})
        self.add(rows)
        self.added += len(rows)
