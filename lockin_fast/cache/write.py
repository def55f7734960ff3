"""Writing a cache: shard by shard, each whole or not there, by any number of processes, resumed after a kill."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lockin_fast.cache.files import NOISE, find_items, is_whole, write_item
from lockin_fast.cache.manifest import settled_manifest
from lockin_fast.cache.plan import Plan, Work
from lockin_fast.cache.store import shard_name
from lockin_fast.progress import Progress
from lockin_fast.rundir import check_place, remove_leftovers

HiddenState = Callable[[Tensor, Tensor], Tensor]
"""(input_ids [B, S], attention_mask [B, S]) on the CPU -> the hidden state [B, S, d] of the layer to cache."""


class Content(Protocol):
    """What is stored of a hidden state: `LatentContent` or `HiddenStateContent`."""

    kind: str

    def key(self, dtype: torch.dtype) -> dict[str, Any]: ...
    def settled(self, sample: Tensor) -> tuple["Content", dict[str, Any]]: ...
    def encode(self, h: Tensor) -> dict[str, Tensor]: ...
    def noise(self, alone: Tensor, batched: Tensor) -> dict[str, Tensor]: ...
    def bytes_per_token(self) -> int: ...


@dataclass(frozen=True)
class WriteSettings:
    """How a cache is written; what it holds does not depend on it, up to rounding.

    batch_size: rows of one forward. shard_tokens: tokens of one file, and what a kill can cost. noise_tokens: tokens
    that run twice, to measure the noise floor. rank, world: which of how many processes this is, each of which writes
    its share of the shards into the same folder; None takes RANK and WORLD_SIZE, as torchrun sets them.
    """

    batch_size: int = 8
    shard_tokens: int = 65536
    noise_tokens: int = 2048
    rank: int | None = None
    world: int | None = None

    def __post_init__(self):
        for name in ("batch_size", "shard_tokens", "noise_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 1 or more")
        rank, world = self.place
        if not 0 <= rank < world:
            raise ValueError(f"rank: got {rank} of {world} processes, expected 0 to {world - 1}")

    @property
    def place(self) -> tuple[int, int]:
        """(rank, world)."""
        rank = int(os.environ.get("RANK", 0)) if self.rank is None else self.rank
        return rank, int(os.environ.get("WORLD_SIZE", 1)) if self.world is None else self.world


def write_cache(
    folder: Path, plan: Plan, hidden_state: HiddenState, content: Content, key: Mapping[str, Any],
    settings: WriteSettings, progress: Progress,
) -> None:  # fmt: skip
    """Write what is missing of the cache of `plan` in `folder`: this process' share of the shards.

    key: what hidden_state depends on, compared when the folder is written again and when it is read.
    Raises CacheError when the folder holds another cache; RunError where it cannot be written or would not fit;
    FloatingPointError for a hidden state that is not finite, naming the row.
    """
    rank, world = settings.place
    check_place(folder, content.bytes_per_token() * len(plan))
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.glob(".*.partial"))
    key = {"kind": content.kind, **key, "text": plan.digest, "tokens": len(plan)}
    key |= {"shard_tokens": settings.shard_tokens, "shards": len(plan.shards)}  # shards of other cuts would not fit

    def measure() -> dict[str, Any]:
        for earlier in folder.glob(f"{NOISE}.*"):  # of a process that was killed before the manifest was there
            earlier.unlink()
        alone, batched = sampled(plan, hidden_state, settings)
        chosen, notes = content.settled(alone)
        write_item(folder, NOISE, chosen.noise(alone, batched))
        return {**notes, "tokens_per_target": plan.tokens_per_target}

    manifest = settled_manifest(folder, key, measure)
    if "channels" in manifest:
        content = content.with_channels(manifest["channels"])
    mine = range(rank, len(plan.shards), world)
    total, done = sum(last - first for first, last in (plan.shards[i] for i in mine)), 0
    there = find_items(folder)
    if rank == 0 and not _is_stored(there.get(NOISE)):
        write_item(folder, NOISE, content.noise(*sampled(plan, hidden_state, settings)))
    progress("caching", 0, total)
    for number in mine:
        first, last = plan.shards[number]
        if not _is_stored(there.get(shard_name(number))):
            shard = _shard(plan.work(number), hidden_state, content, settings.batch_size)
            write_item(folder, shard_name(number), shard)
        done += last - first
        progress("caching", done, total)


def _is_stored(path: Path | None) -> bool:
    """Whether a file is there, and whole; a damaged one is removed."""
    if path is None or is_whole(path):
        return path is not None
    path.unlink()
    return False


def _shard(works: list[Work], hidden_state: HiddenState, content: Content, batch_size: int) -> dict[str, Tensor]:
    """The tensors of one shard, its tokens by rising key."""
    parts = [content.encode(h) for h in _hidden(works, hidden_state, batch_size)]
    keys = torch.cat([work.keys for work in works])
    order = keys.argsort()
    return {"keys": keys[order]} | {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}


def _hidden(works: list[Work], hidden_state: HiddenState, batch_size: int) -> Iterator[Tensor]:
    """The hidden states [n, d] of the wanted tokens, batch after batch, in the order of `works`."""
    for start in range(0, len(works), batch_size):
        batch = works[start : start + batch_size]
        length = max(len(work.input_ids) for work in batch)
        ids, attention = torch.zeros((2, len(batch), length), dtype=torch.int64)
        for i, work in enumerate(batch):
            ids[i, : len(work.input_ids)] = work.input_ids
            attention[i, : len(work.input_ids)] = 1
        h = hidden_state(ids, attention)
        row = torch.cat([torch.full_like(work.positions, i) for i, work in enumerate(batch)])
        wanted = h[row.to(h.device), torch.cat([work.positions for work in batch]).to(h.device)]
        if not bool(wanted.isfinite().all()):
            bad = int((~wanted.isfinite()).any(dim=1).nonzero()[0])
            raise FloatingPointError(
                f"cache: the hidden state of row {batch[int(row[bad])].row} of the dataset is not finite; use bf16 or "
                "fp32 instead of fp16, and see that the model is whole"
            )
        yield wanted


def sampled(plan: Plan, hidden_state: HiddenState, settings: WriteSettings) -> tuple[Tensor, Tensor]:
    """The same tokens' hidden states [n, d], each row alone in its batch, and rows of all lengths padded together."""
    works = plan.sample(settings.noise_tokens)
    batch_size = min(max(settings.batch_size, 2), len(works))
    alone, batched = (torch.cat([*_hidden(works, hidden_state, size)]) for size in (1, batch_size))
    return alone[: settings.noise_tokens], batched[: settings.noise_tokens]
