"""Running with a certain number of threads, whatever the machine has or its user asked for."""

from contextlib import contextmanager

import torch


@contextmanager
def on_threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
