"""What a benchmark file offers: cases, each a problem with several ways to solve it.

    def cases():
        yield Case("row label", {"T": 4096, "d": 4096}, work, ("block_penalty",))

`work()` builds the tensors and returns `Work`. It is called with torch's default device set (CPU, or a GPU), so tensors
are made by plain `torch.randn(...)` after `torch.manual_seed(...)`, without generators of a fixed device. What does not
install, or does not run on that device, is left out of the providers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Ways to solve one problem, and the least any of them has to do.

    providers: name -> callable without arguments; ours: which of them are this project's; without: one whose time is
    subtracted from all others (a step without the part in question), or None. bytes: least memory traffic, reads and
    writes; flops: floating point operations that no exact method avoids, 0 where they are negligible. bare: one whose
    time is the floor the others are compared with (a plain product), or None.
    """

    providers: Mapping[str, Callable[[], object]]
    ours: tuple[str, ...]
    bytes: int
    flops: int = 0
    without: str | None = None
    bare: str | None = None


@dataclass(frozen=True)
class Case:
    """A labelled problem of some shape; rounds and allocators may be fewer for what takes seconds.

    ops: whose speed the time of ours tells, by their names in torch.ops.lockin_fast.
    """

    label: str
    shape: Mapping[str, object]
    work: Callable[[], Work]
    ops: tuple[str, ...]
    rounds: int = 25
    allocators: tuple[str, ...] = ("default", "retained")
