"""Running the compiled kernels with a certain number of threads, whatever the machine has or its user asked for."""

from contextlib import contextmanager

import torch

import lockin_fast

# Stock torch sums in another order with other threads, and triton's interpreter can hang when their number changes.
COMPILED = any(row.backend == "cpu" for row in lockin_fast.backends() if row.device == "cpu")


@contextmanager
def on_threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count if COMPILED else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
