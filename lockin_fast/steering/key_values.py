"""A cache of keys and values in slots, for sequences of different lengths that come and go."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache

CHUNK = 16  # tokens by which a cache grows at least


class Reached(Exception):
    """The last layer that is wanted has run."""


class KeyValues(Cache):
    """Keys and values of those layers that write here, [slots, heads, entries, width] each.

    Entry j of a slot belongs to its token at position j, so that what a token may read is told by positions alone.
    Slots in use are 0 to n - 1: a forward reads and writes a view of them, never a copy. Entries that no token of a
    slot has written yet hold finite numbers at any time, since attention multiplies them by 0. Memory is taken as it is
    needed, up to `slots` and `capacity`, in steps so large that growing costs no more than writing.
    """

    def __init__(self, slots: int, capacity: int):
        super().__init__(layers=[])
        self._most = slots, capacity
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._written = 0  # entries from here on are still the zeros they were made as, in every slot

    def write_next(
        self, slots: slice, start: int | Tensor, length: int, stop_at: int | None = None
    ) -> "KeyValues":
        """Say what the next forward is: its rows are these slots, which then read their first `length` entries.

        start: the position of every row's first token, or one position a row, [n] int64, for one token a row. A forward
        ends in `Reached` once layer `stop_at` has written.
        """
        self._slots, self._start, self.length, self._stop_at = slots, start, length, stop_at
        self._written = max(self._written, length)
        return self

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """What a model's attention calls: write [n, heads, S, width] of a layer, get back all that its slots hold."""
        read = [self._write(self._keys, layer_idx, key_states), self._write(self._values, layer_idx, value_states)]
        if layer_idx == self._stop_at:
            raise Reached
        return tuple(read)

    def _write(self, store: dict[int, Tensor], layer: int, states: Tensor) -> Tensor:
        held = self._grown(store, layer, states, self._slots.stop, self.length)[self._slots]
        if isinstance(self._start, int):
            held[:, :, self._start : self._start + states.shape[2]] = states
        else:
            rows = torch.arange(len(held), device=held.device)
            held[rows, :, self._start.to(held.device)] = states[:, :, 0]
        return held[:, :, : self.length]

    def _grown(self, store: dict[int, Tensor], layer: int, like: Tensor, slots: int, length: int) -> Tensor:
        """The layer's tensor, with room for so many slots and entries."""
        held = store.get(layer)
        had = (0, 0) if held is None else (held.shape[0], held.shape[2])
        if slots > had[0] or length > had[1]:
            rows = min(max(slots, 2 * had[0]), self._most[0]) if slots > had[0] else had[0]
            entries = min(max(length, had[1] * 3 // 2) + CHUNK, self._most[1]) if length > had[1] else had[1]
            store[layer] = like.new_zeros(rows, like.shape[1], entries, like.shape[3])
            if held is not None:
                store[layer][: had[0], :, : had[1]] = held
        return store[layer]

    def begin(self, slots: slice, other: "KeyValues", sources: Tensor, length: int) -> None:
        """Put sequences into slots: entries 0 to length - 1 come from slots `sources` of `other`, the rest is clear."""
        self._written = max(self._written, length)
        for mine, theirs in ((self._keys, other._keys), (self._values, other._values)):
            for layer, tensor in theirs.items():
                held = self._grown(mine, layer, tensor, slots.stop, length)
                held[slots, :, :length] = tensor[sources.to(tensor.device), :, :length]
            for tensor in mine.values():
                tensor[slots, :, length : self._written] = 0

    def rearrange(self, sources: Sequence[int]) -> None:
        """Slot i goes on from what slot sources[i] holds; several may go on from the same one."""
        moved = [slot for slot, source in enumerate(sources) if slot != source]
        if not moved:
            return
        for store in (self._keys, self._values):
            for layer, tensor in store.items():
                held = self._grown(store, layer, tensor, len(sources), 0)
                taken = torch.tensor([sources[slot] for slot in moved], device=held.device)
                held[torch.tensor(moved, device=held.device), :, : self._written] = held[taken, :, : self._written]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Models ask before they look at the positions they are given."""
        return 0


def masks(
    kinds: Sequence[str], window: int | None, positions: Tensor, length: int, dtype: torch.dtype | None
) -> Tensor | dict[str, Tensor]:
    """What tokens at `positions` [n, S] may read of entries 0 to length - 1, for each kind of layer: [n, 1, S, length].

    Boolean, or additive in `dtype`. One tensor when the model has layers of one kind, else one by the kind's name.
    """
    behind = positions[:, None, :, None] - torch.arange(length, device=positions.device)
    made = {}
    for kind in kinds:
        read = behind >= 0 if kind == "full_attention" else (behind >= 0) & (behind < window)
        made[kind] = read if dtype is None else torch.zeros_like(read, dtype=dtype).masked_fill_(~read, -torch.inf)
    return made if len(made) > 1 else made[kinds[0]]
