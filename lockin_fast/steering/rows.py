"""What is asked of a steered generation, and what it took."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from lockin_fast.blocking.layers import decoder_layer, hidden_size


@dataclass(frozen=True)
class SteeredRow:
    """One reply that is wanted: to prompt number `prompt`, along direction number `direction`, this far.

    The coefficient is in the units of the residual stream; direction -1 or coefficient 0 leaves the model alone.
    """

    prompt: int
    direction: int
    coefficient: float

    @property
    def steering(self) -> tuple[int, float]:
        """(direction, coefficient), one and the same for everything that leaves the model alone."""
        if self.direction == -1 or self.coefficient == 0:
            return -1, 0.0
        return self.direction, float(self.coefficient)


class Wanted(NamedTuple):
    """A reply to be made, among prompts that are asked about."""

    prompt: int
    direction: int
    coefficient: float

    @property
    def steering(self) -> tuple[int, float]:
        """(direction, coefficient)."""
        return self[1:]


@dataclass
class Work:
    """How much was computed, in tokens; padding is not counted. "Below" is layers 0 to the steered one.

    prompt_below: prompt tokens through the layers below. prompt_above: the same through those above, where every
    steering has its own; a prompt's last token counts as its reply's first. text_below: tokens of replies through
    the layers below, one for all rows that have said the same to the same prompt. row_above: those of single rows
    through the layers above and the unembedding. steps: forwards that gave tokens. fallback: why the model could
    not be split at the steered layer, None when it was; nothing is counted then.
    """

    prompt_below: int = 0
    prompt_above: int = 0
    text_below: int = 0
    row_above: int = 0
    steps: int = 0
    fallback: str | None = None


def check_request(
    model: Any, prompts: Sequence, rows: Sequence[SteeredRow], directions: Tensor, layer: int, **counts: int
) -> None:
    """Raise ValueError, naming the argument, for anything out of range."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected 1 or more")
    decoder_layer(model, layer)
    width = hidden_size(model)
    if directions.dim() != 2 or directions.shape[1] != width or not directions.is_floating_point():
        raise ValueError(
            f"directions: got {directions.dtype} {list(directions.shape)}, expected floating point [F, {width}], as "
            "wide as the model's hidden states"
        )
    for number, row in enumerate(rows):
        if not 0 <= row.prompt < len(prompts):
            raise ValueError(f"rows: row {number} has prompt {row.prompt}, expected 0 to {len(prompts) - 1}")
        if not -1 <= row.direction < len(directions):
            raise ValueError(
                f"rows: row {number} has direction {row.direction}, expected 0 to {len(directions) - 1}, or -1 for none"
            )
        if not math.isfinite(row.coefficient):
            raise ValueError(f"rows: row {number} has the coefficient {row.coefficient}, expected a finite number")
