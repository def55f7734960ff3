"""The processes that torchrun or accelerate started for one run: this one's place among them, and waiting for all."""

import os

import torch


def count() -> int:
    """How many processes share the run: what the launcher says in WORLD_SIZE, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return count() == 1 or int(os.environ.get("RANK", 0)) == 0


def device() -> str:
    """Where this process computes: the GPU of its number on this machine, or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ['LOCAL_RANK']}" if count() > 1 else "cuda"


def wait_for_all() -> None:
    """Return when every process has come here; at once where there is one, or where they have not met yet."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def part() -> None:
    """Leave the group of processes, when all have come here: the last thing a command does."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
