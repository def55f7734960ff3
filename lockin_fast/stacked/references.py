"""What the loss terms of a stack are anchored to, found once for every distinct batch."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lockin_fast.blocking.fingerprint import check_cache
from lockin_fast.blocking.reference import Reference
from lockin_fast.blocking.terms import LossTerm
from lockin_fast.blocking.tokens import token_mask
from lockin_fast.cache import TokenStore
from lockin_fast.cache.collate import looked_up
from lockin_fast.cache.keys import token_keys
from lockin_fast.stacked.data import StackedBatch


class References:
    """The references of these terms: the base model's hidden states, or what a cache holds.

    The base model runs on the distinct batches, not on every adapter's copy of them, and stops after the last site.
    Raises ValueError for a second model as reference, CacheError for a cache of something else.
    """

    def __init__(self, model: nn.Module, terms: Iterable[LossTerm], *, autocast: str):
        live, checked = [], set()
        for term in terms:
            if isinstance(term.reference, TokenStore):
                if (id(term.reference), term.site) not in checked:
                    check_cache(term.reference, model, term.site, autocast)
                    checked.add((id(term.reference), term.site))
            elif term.reference == "live":
                live.append(term.site)
            else:
                raise ValueError('reference: a stack has its base model at hand; use reference="live", or a cache')
        self._live = Reference(model, *dict.fromkeys(live), adapters=True) if live else None

    def run(self, batch: StackedBatch, device: torch.device) -> None:
        """Run the base model on a batch on the CPU, under the caller's autocast; `of` then answers for this batch."""
        self._batch, self._device, self._keys, self._read = batch, device, None, {}
        self._hidden = {}
        if self._live is not None:
            arguments = {"input_ids": batch.distinct.flatten(0, 1).to(device, non_blocking=True), "use_cache": False}
            self._hidden = self._live.hidden_states((), arguments)

    def of(self, term: LossTerm, which: int):
        """The reference of a term for the rows of distinct batch `which`, as `LossTerm.measure` takes it."""
        rows = self._batch.distinct.shape[1]
        part = slice(which * rows, (which + 1) * rows)
        if not isinstance(term.reference, TokenStore):
            return self._hidden[term.site][part]
        # Terms that differ in lambda alone read the same.
        key = id(term.reference), term.site, term.latents.positive, term.latents.negative, term.gate, term.tokens
        if key not in self._read:
            self._read[key] = self._look_up(term)
        return {name: tensor[part] for name, tensor in self._read[key].items()}

    def _look_up(self, term: LossTerm) -> dict[str, Tensor]:
        ids, labels, attention = (getattr(self._batch, name).flatten(0, 1) for name in StackedBatch._fields[:3])
        if self._keys is None:
            self._keys = token_keys(ids, attention)
        wanted = token_mask(term.tokens, labels, {"attention_mask": attention}, torch.empty(*ids.shape, 1))
        found = looked_up(term.cached, self._keys, wanted, ids)
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in found.items()}
