"""What is seen of a training from outside: its steps and epochs as they pass, their time, the peak of memory."""

import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from lockin_fast.checkpoint import Checkpoint

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class Watch:
    """A `progress` that does more: judge every epoch, and keep the training's state.

    epoch_done(epoch, model), where given, runs after each epoch, the model in training mode; what it does to the
    model's mode it has to undo, and its time is not counted as training. What it returns is a row of `epochs`.
    checkpoint: where the state is kept between steps; a killed training goes on from there, to the same bytes.
    """

    progress: Callable[[int, int], None]
    epoch_done: Callable[[float, nn.Module], dict] | None = None
    checkpoint: Checkpoint | None = None
    epochs: list[dict] = field(default_factory=list)

    def __call__(self, step: int, total: int) -> None:
        self.progress(step, total)


def watching(watch: Watch):
    """A trainer callback that times the steps, reports them, and closes the history with the last one."""
    from transformers import TrainerCallback

    class Watching(TrainerCallback):
        def __init__(self):
            self.seconds, self.timed = 0.0, 0  # of steps, without the first
            self.first = None  # its seconds
            self.last = time.perf_counter()

        def on_train_begin(self, args, state, control, **kwargs):
            self.last = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            now = time.perf_counter()
            if self.first is None:
                self.first = now - self.last
            else:
                self.seconds += now - self.last
                self.timed += 1
            self.last = now
            watch.progress(state.global_step, state.max_steps)
            if state.global_step >= state.max_steps:
                control.should_log = True

        def on_epoch_end(self, args, state, control, model=None, **kwargs):
            if watch.epoch_done is not None:
                start = time.perf_counter()
                watch.epochs.append(watch.epoch_done(round(state.epoch, 6), model))
                self.last += time.perf_counter() - start

        def seconds_per_step(self) -> float:
            return self.seconds / self.timed if self.timed else self.first or 0.0

    return Watching()


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
