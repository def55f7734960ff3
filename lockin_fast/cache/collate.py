"""Adding a batch's reference to the batch, in the data loader."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockin_fast.cache.files import CacheError
from lockin_fast.cache.keys import token_keys
from lockin_fast.cache.store import Reference
from lockin_fast.labels import penalised

PREFIX = "block_reference_"
REMEDY = (
    "the cache was written for other text, another tokenizer or chat template, or a smaller max_length; run "
    "`lockin-fast cache` for this data in a new folder"
)


class ReferenceCollator:
    """A collator, and the references of the batch it makes, looked up on the CPU where the batch is made.

    So training waits for no look-up, nothing is synchronised, and any batching, padding, truncation or packing is
    right. What is added lies under names of its own; `take_references` takes it out again.
    reads: (reference, tokens) pairs, "supervised" or "all" as the penalty counts them. Raises CacheError for a token
    that is not cached.
    """

    def __init__(self, collate: Callable[[Sequence], Mapping[str, Any]], reads: Sequence[tuple[Reference, str]]):
        self.collate, self.reads = collate, reads

    def __call__(self, rows: Sequence) -> dict[str, Any]:
        batch = dict(self.collate(rows))
        added = {}
        for number, taken in enumerate(references_of_batch(batch, self.reads)):
            added |= {f"{PREFIX}{number}_{name}": tensor for name, tensor in taken.items()}
        return batch | added


def references_of_batch(
    batch: Mapping[str, Any], reads: Sequence[tuple[Reference, str]]
) -> list[dict[str, Tensor]]:
    """What the references hold of a batch's tokens, one for each of `reads`, as `looked_up` gives it.

    batch: input_ids [B, S]; attention_mask, position_ids and labels where it has them.
    """
    ids = batch["input_ids"]
    keys = token_keys(ids, batch.get("attention_mask"), batch.get("position_ids"))
    return [looked_up(reference, keys, _wanted(tokens, batch), ids) for reference, tokens in reads]


def take_references(batch: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Take what `ReferenceCollator` added out of the batch, in place: for each reference, tensors by name."""
    found: dict[int, dict[str, Tensor]] = {}
    for key in [key for key in batch if key.startswith(PREFIX)]:
        number, _, name = key.removeprefix(PREFIX).partition("_")
        found.setdefault(int(number), {})[name] = batch.pop(key)
    return [found[number] for number in sorted(found)]


def looked_up(reference: Reference, keys: np.ndarray, wanted: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
    """What the reference holds of the wanted tokens (bool [B, S]), each [B, S, ...], zeros for other tokens."""
    where = wanted.cpu().numpy()
    place = reference.store.find(keys[where])
    if (place < 0).any():
        row, position = (int(index[place < 0][0]) for index in where.nonzero())
        near = input_ids[row, max(0, position - 7) : position + 1].tolist()
        raise CacheError(
            f"cache: {reference.store.path} lacks {int((place < 0).sum())} of {len(place)} tokens of a batch; the "
            f"first is token {near[-1]} at row {row}, position {position}, after {near[:-1]}: {REMEDY}"
        )
    spread = {}
    for name, values in reference.take(place).items():
        spread[name] = values.new_zeros((*wanted.shape, *values.shape[1:]))
        spread[name][wanted.cpu()] = values
    return spread


def check_rows(reference: Reference, rows: Sequence[Mapping[str, Any]], tokens: str) -> None:
    """Raise CacheError naming the first of the dataset's rows, {"input_ids", "labels"}, that has a token not cached."""
    for number, row in enumerate(rows):
        ids = torch.as_tensor(row["input_ids"])
        given = [name for name in ("input_ids", "labels") if row.get(name) is not None]
        wanted = _wanted(tokens, {name: torch.as_tensor(row[name])[None] for name in given})[0].numpy()
        absent = reference.store.find(token_keys(ids[None])[0][wanted]) < 0
        if absent.any():
            position = int(wanted.nonzero()[0][absent][0])
            raise CacheError(
                f"cache: {reference.store.path} lacks row {number} of the dataset from position {position} on: {REMEDY}"
            )


def _wanted(tokens: str, batch: Mapping[str, Any]) -> Tensor:
    """The tokens that the penalty will count, bool [B, S]."""
    labels = batch.get("labels")
    if labels is None and tokens == "supervised":
        raise ValueError("labels: the batch has none; the penalty needs them to find supervised tokens")
    return penalised(tokens, batch["input_ids"] if labels is None else labels, batch.get("attention_mask"))
