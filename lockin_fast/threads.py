"""How many threads torch computes with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single_thread() -> Iterator[None]:
    """One thread inside, as many as before afterwards.

    For models as small as the organism: sums are then taken in the same order on any number of cores, so that the same
    seed grows the same organism, and a second thread would gain little where the cores are free and cost much where
    they are not.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
