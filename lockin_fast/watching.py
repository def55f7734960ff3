"""What is seen of a training from outside: its steps and epochs as they pass, their time, the peak of memory."""

import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class EpochWatch:
    """A `progress` that is told of epochs too: epoch_done(epoch, model) runs after each, the model in training mode.

    What it does to the model's mode it has to undo; its time is not counted as training.
    """

    progress: Callable[[int, int], None]
    epoch_done: Callable[[float, nn.Module], None]

    def __call__(self, step: int, total: int) -> None:
        self.progress(step, total)


def watching(progress: Callable[[int, int], None] | None):
    """A trainer callback that times the steps, reports them, and closes the history with the last one."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self):
            self.times = [time.perf_counter()]
            self.paused = 0.0

        def on_train_begin(self, args, state, control, **kwargs):
            self.times = [time.perf_counter()]

        def on_step_end(self, args, state, control, **kwargs):
            self.times.append(time.perf_counter() - self.paused)
            if progress is not None:
                progress(state.global_step, state.max_steps)
            if state.global_step >= state.max_steps:
                control.should_log = True

        def on_epoch_end(self, args, state, control, model=None, **kwargs):
            if isinstance(progress, EpochWatch):
                start = time.perf_counter()
                progress.epoch_done(round(state.epoch, 6), model)
                self.paused += time.perf_counter() - start

        def seconds_per_step(self) -> float:
            start, *steps = self.times
            if len(steps) > 1:
                return (steps[-1] - steps[0]) / (len(steps) - 1)
            return steps[0] - start

    return Watch()


def reset_peak(device: torch.device) -> None:
    """Begin a new peak; see `peak_bytes`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            CLEAR_REFS.write_text("5")  # the high-water mark of the resident set; see proc_pid_clear_refs(5)


def peak_bytes(device: torch.device) -> int | None:
    """The peak since `reset_peak` in bytes, None where the system cannot tell; see `TrainResult`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not os.access(CLEAR_REFS, os.W_OK):
        return None  # the peak since the process began says nothing about this run
    mark = re.search(r"^VmHWM:\s*(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    return int(mark[1]) * 1024 if mark else None
