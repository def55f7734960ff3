"""The sites of a sweep: layer, component, head, positions, and which side's states go where."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lockin_fast.patching.components import Component
from lockin_fast.patching.patched import Placed
from lockin_fast.patching.sides import Side
from lockin_fast.patching.spans import PromptTokens, covers_reply

Direction = Literal["repair", "induce"]
SIDES: dict[Direction, tuple[Side, Side]] = {  # (source, target)
    "repair": ("base", "misaligned"),
    "induce": ("misaligned", "base"),
}


@dataclass(frozen=True, order=True)
class Site:
    """One cell of a sweep. repair puts the base's states into the misaligned model, induce the other way round."""

    direction: Direction
    component: Component
    layer: int
    positions: str
    head: int | None = None

    def placed(self, row: int, prompt: PromptTokens, length: int) -> Placed | None:
        """The patch of this site in a row whose prompt is padded on the left to `length`; None where it has none."""
        pads = length - len(prompt.ids)
        columns = tuple(pads + position for position in prompt.positions(self.positions))
        reply = covers_reply(self.positions)
        return Placed(row, columns, reply, self.head) if columns or reply else None


def sites(
    directions: Sequence[Direction], components: Sequence[Component], layers: Sequence[int], positions: Sequence[str],
    heads: int,
) -> list[Site]:  # fmt: skip
    """Every combination, the sites that can share batches next to each other; "heads" has one site for each head."""
    return [
        Site(direction, component, layer, name, head)
        for direction in directions
        for component in components
        for layer in layers
        for name in positions
        for head in (range(heads) if component == "heads" else (None,))
    ]
