"""The loss and the loss terms of every adapter of a stack, in one forward of all."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lockin_fast.blocking.layers import Captured, captured_forward, site_module
from lockin_fast.blocking.terms import LossTerm
from lockin_fast.stacked.data import StackedBatch
from lockin_fast.stacked.references import References

Terms = tuple[LossTerm, ...]


class Measures(NamedTuple):
    """What one micro-batch adds to the step of every adapter, each [N]; losses are divided by the step's targets."""

    losses: Mapping[str, Tensor]  # sft_loss, and the columns of the terms, without their weights
    active: Tensor
    pairs: Tensor


class Objective:
    """The loss of adapter n on its rows: (sum of nll + sum over its terms of weight * total) / its count of targets.

    The head runs on supervised positions only. The model gets no attention mask: padding is on the right, where no
    earlier token attends to it. Raises as `References`, and as the terms' own check_model.
    """

    def __init__(self, model: nn.Module, terms: Sequence[Terms], *, bf16: bool):
        self._model, self._terms, self._bf16 = model, list(terms), bf16
        distinct = dict.fromkeys(term for own in terms for term in own)
        self._references = References(model, distinct, autocast="bf16" if bf16 else "no")
        for term in distinct:
            term.check_model(model)
        self._sites = {term.site: site_module(model, term.site) for term in distinct}
        self._head = model.get_output_embeddings()

    def __call__(self, batch: StackedBatch, counts: Tensor) -> tuple[Tensor, Measures]:
        """(the sum over adapters of their losses, to call backward on; what was measured). counts: fp32 [N]."""
        device = self._model.device
        # What depends on the data's content is found where the data is, so that nothing waits for a GPU.
        positions, targets, owner = (tensor.to(device, non_blocking=True) for tensor in batch.supervised())
        self._of = batch.of.tolist()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._bf16):
            logits, seen = self._forward(batch.input_ids.to(device, non_blocking=True), positions)
            self._references.run(batch, device)
        batch = StackedBatch(*(tensor.to(device, non_blocking=True) for tensor in batch))
        nll = F.cross_entropy(logits.float(), targets, reduction="none")
        nll = torch.zeros_like(counts).index_add_(0, owner, nll) / counts
        measures = Measures(
            {name: torch.zeros_like(counts) for name in columns_of(self._terms)},
            torch.zeros_like(counts),
            torch.zeros_like(counts),
        )
        measures.losses["sft_loss"].copy_(nll.detach())
        return self._add_terms(nll.sum(), batch, seen, counts, measures), measures

    def _forward(self, input_ids: Tensor, positions: Tensor) -> tuple[Tensor, Captured]:
        """Logits [M, V] at the positions of the flattened rows, and the hidden states [N * b, S, d] at the sites."""

        def gather(module, args):
            return (args[0].flatten(0, 1).index_select(0, positions)[None], *args[1:])

        handle = self._head.register_forward_pre_hook(gather)
        try:
            with captured_forward(self._model, *self._sites.values()) as seen:
                return self._model(input_ids=input_ids, use_cache=False).logits[0], seen
        finally:
            handle.remove()

    def _add_terms(self, loss: Tensor, batch: StackedBatch, seen: Captured, counts, measures) -> Tensor:
        rows, of = batch.distinct.shape[1], self._of
        hidden = {site: seen.hidden[module].split(rows) for site, module in self._sites.items()}
        for n, terms in enumerate(self._terms):
            for term in terms:
                own = hidden[term.site][n] if term.weight else hidden[term.site][n].detach()
                known = {"attention_mask": batch.attention[of[n]]}
                measured = term.measure(own, self._references.of(term, of[n]), batch.labels[of[n]], known)
                mean = measured.total / counts[n]
                loss = loss + term.weight * mean if term.weight else loss
                measures.losses[term.column][n] += mean.detach()
                measures.active[n] += measured.active
                measures.pairs[n] += measured.pairs
        return loss


def columns_of(terms: Sequence[Terms]) -> tuple[str, ...]:
    """The losses that are logged of adapters with these terms."""
    return tuple(dict.fromkeys(["sft_loss", *(term.column for own in terms for term in own)]))
