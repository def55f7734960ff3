"""How attention heads are scored, and which checkpoints are looked at for the onset of induction."""

import dataclasses
from pathlib import Path

from lockin_fast.sweep_settings import no_value_twice


@dataclasses.dataclass(frozen=True)
class CircuitSettings:
    """Induction and copying scores of all heads of the model, and what the induction heads do.

    length: tokens of one copy; a sequence is the start token, where the tokenizer has one, and two copies of random
    tokens. sequences: of every seed. seeds: draws of the random tokens; the standard error is over them. thresholds:
    prefix-matching scores from which a head counts as an induction head. draws: sets of random heads that each set of
    induction heads is compared with. batch_size: rows of one forward. checkpoints: folder of model folders whose names
    end in the step, such as step-000100, in whose course induction may begin; null leaves that out.
    """

    length: int = 50
    sequences: int = 8
    seeds: tuple[int, ...] = (0, 1, 2)
    thresholds: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    draws: int = 20
    batch_size: int = 8
    checkpoints: Path | None = None

    def __post_init__(self):
        for name, valid, expected in (
            ("length", self.length >= 2, "2 or more"),
            ("sequences", self.sequences >= 1, "1 or more"),
            ("seeds", self.seeds and no_value_twice(self.seeds), "one or more, none twice"),
            ("seeds", all(0 <= seed < 2**31 for seed in self.seeds), "0 to 2^31 - 1"),
            ("thresholds", self.thresholds and no_value_twice(self.thresholds), "one or more, none twice"),
            ("thresholds", all(0 < value <= 1 for value in self.thresholds), "above 0, up to 1"),
            ("draws", self.draws >= 1, "1 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
        ):
            if not valid:
                got = getattr(self, name)
                raise ValueError(
                    f"circuits.{name}: got {list(got) if isinstance(got, tuple) else got!r}, expected {expected}"
                )
