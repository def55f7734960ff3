"""The section of a configuration that says what is patched, where, and with what."""

import dataclasses
from pathlib import Path
from typing import Literal

from lockin_fast.sweep_settings import no_value_twice

POSITIONS = ("prefix", "last", "generated", "all")  # the last two patch every token of the reply as it is generated


@dataclasses.dataclass(frozen=True)
class PatchSettings:
    """Which states of one model are put into the other, and what is measured under each such patch.

    misaligned: PEFT adapter of the fine-tune that is compared with its base; null for discovery.misaligned. layers:
    decoder layers, 0-based, null for all. positions: prefix (the whole prompt), last (its last token), generated (the
    reply's tokens), all, a role (system, user, assistant), or a range of the prompt's tokens such as 3..8 or -4.. .
    components: residual, attention, mlp, heads. directions: repair puts the base's states into the misaligned model,
    induce the other way round. source: live, as the other side leaves them; nf4, in four bits; cache, the base's states
    of the prompts in four bits from the folder `cache`, which is written where it is missing.
    prompts: core prompts that are used, evenly spread; null for all. samples: replies a prompt that are drawn from the
    misaligned model, of which a misaligned and an aligned one are contrasted. replies: replies a prompt and site are
    generated and judged; 0 leaves that out. generated: the components for whose sites that is done. attribution:
    whether every site's effect is estimated by attribution patching as well. latents: a latent set, of whose changes at
    every layer and position set the largest are told. seed: draws samples and replies. circuits: whether
    `lockin-fast patch` scores attention heads too, as its option --circuits says.
    """

    misaligned: Path | None = None
    layers: tuple[int, ...] | None = None
    positions: tuple[str, ...] = POSITIONS
    components: tuple[Literal["residual", "attention", "heads", "mlp"], ...] = ("residual",)
    directions: tuple[Literal["repair", "induce"], ...] = ("repair", "induce")
    source: Literal["live", "nf4", "cache"] = "live"
    cache: Path | None = None
    prompts: int | None = 45
    samples: int = 16
    replies: int = 1
    generated: tuple[Literal["residual", "attention", "heads", "mlp"], ...] = ("residual",)
    attribution: bool = True
    latents: Path | None = None
    seed: int = 0
    circuits: bool = False

    def __post_init__(self):
        for name, valid, expected in (
            ("layers", self.layers is None or (self.layers and min(self.layers) >= 0), "0-based indices, or null"),
            ("prompts", self.prompts is None or self.prompts >= 1, "1 or more, or null for all"),
            ("samples", self.samples >= 2, "2 or more"),
            ("replies", self.replies >= 0, "0 or more"),
            ("seed", 0 <= self.seed < 2**31, "0 to 2^31 - 1"),
            ("generated", set(self.generated) <= set(self.components), f"some of components={list(self.components)}"),
            ("cache", (self.cache is not None) == (self.source == "cache"), "a folder with source=cache, else null"),
        ):
            if not valid:
                raise ValueError(f"{name}: got {_shown(getattr(self, name))}, expected {expected}")
        for name in ("layers", "positions", "components", "directions"):
            values = getattr(self, name)
            if values is not None and not (values and no_value_twice(values)):
                raise ValueError(f"{name}: got {_shown(values)}, expected one or more, none twice")
        if self.source == "cache":
            for name, valid, expected in (
                ("directions", self.directions == ("repair",), "[repair]: the cache holds the base's states"),
                ("components", self.components == ("residual",), "[residual]: the cache holds no other states"),
                ("positions", not {"generated", "all"} & set(self.positions), "no generated or all: it holds prompts"),
            ):
                if not valid:
                    got = _shown(getattr(self, name))
                    raise ValueError(f"{name}: got {got}, with source=cache expected {expected}")
        if set(self.generated) - {"residual"} and self.replies and {"generated", "all"} & set(self.positions):
            raise ValueError(
                f"generated: got {_shown(self.generated)}; the positions generated and all patch each token of a reply "
                "as it is there, which is for residual alone: take [residual], or other positions"
            )


def _shown(value) -> str:
    return repr(list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value)
