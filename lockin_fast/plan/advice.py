"""What to change for a configuration to fit, cheapest first, and the predicted peak of each change."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lockin_fast.plan.memory import Workload, predict


@dataclass(frozen=True)
class Suggestion:
    """A setting as the configuration writes it, and the predicted peak with it alone and on top of those before it."""

    setting: str
    alone: int
    together: int


def advise(work: Workload, usable: int) -> tuple[list[Suggestion], Workload]:
    """Changes in order until the peak is within `usable` bytes or nothing is left to change, and where they lead.

    Changes that do not lower the peak are left out.
    """
    suggestions: list[Suggestion] = []
    current = work
    for change in (_micro_batch, _checkpointing, _quantization, _reference, _stack):
        if predict(current).peak <= usable:
            break
        for setting, together in [change(current, usable)]:
            if predict(together).peak < predict(current).peak:
                _, alone = change(work, usable)
                suggestions.append(Suggestion(setting, predict(alone).peak, predict(together).peak))
                current = together
    return suggestions, current


def _micro_batch(work: Workload, usable: int) -> tuple[str, Workload]:
    """The largest divisor of the batch with which it fits, or 1."""
    sizes = [size for size in _down(work.micro_batch) if work.batch % size == 0]
    smaller = _first_that_fits([replace(work, micro_batch=size) for size in sizes], usable)
    return f"train.micro_batch_size={smaller.micro_batch}", smaller


def _checkpointing(work: Workload, usable: int) -> tuple[str, Workload]:
    return "train.gradient_checkpointing=true", replace(work, checkpointing=True)


def _quantization(work: Workload, usable: int) -> tuple[str, Workload]:
    return "quantization=nf4", replace(work, quantization="nf4")


def _reference(work: Workload, usable: int) -> tuple[str, Workload]:
    return "block.reference=cache", replace(work, reference="none" if work.reference == "none" else "cache")


def _stack(work: Workload, usable: int) -> tuple[str, Workload]:
    smaller = _first_that_fits([replace(work, stack=size) for size in _down(work.stack)], usable)
    return f"sweep.stack={smaller.stack}", smaller


def _down(size: int) -> Iterator[int]:
    """Sizes below `size`, in falling order; 1 itself has none."""
    return iter(range(size - 1, 0, -1)) if size > 1 else iter((1,))


def _first_that_fits(works: list[Workload], usable: int) -> Workload:
    return next((work for work in works if predict(work).peak <= usable), works[-1])
