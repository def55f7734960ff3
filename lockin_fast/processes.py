"""The processes that torchrun or accelerate started for one run: this one's place among them, and waiting for all."""

import datetime
import os

import torch


def count() -> int:
    """How many processes share the run: what the launcher says in WORLD_SIZE, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Which of them this process is, from 0 on."""
    return int(os.environ.get("RANK", 0)) if count() > 1 else 0


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def device() -> str:
    """Where this process computes: a GPU, of several processes its own, which becomes the current one; or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    if count() > 1:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return "cuda"


def check_whole_model() -> None:
    """Raise ValueError where `accelerate launch` was told to shard the model among the processes."""
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            raise ValueError(
                f"ACCELERATE_USE_{name}: this trains with a whole model in every process; launch it with torchrun, or "
                "give the penalty to a Trainer of your own, which may be sharded"
            )


def wait_for_all() -> None:
    """Return when every process has come here; at once where there is one, or where they have not met yet."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def meet() -> None:
    """Join the group of processes that wait for each other on the CPU, for as long as their work may take."""
    if count() > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))


def part() -> None:
    """Leave the group of processes, when all have come here: the last thing a command does."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
