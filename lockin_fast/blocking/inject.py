"""The loss terms in a training loop of any kind: their gradient is added on the way back, the loss stays as it is."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lockin_fast.blocking.layers import captured_forward, site_module, unwrap
from lockin_fast.blocking.reference import references_of
from lockin_fast.blocking.terms import LossTerm, checked_hidden, checked_terms
from lockin_fast.cache import TokenStore
from lockin_fast.quantized import keep_trainable


class GradientInjection:
    """Adds the gradient of lambda * L_block to every backward of a loop of your own.

        blocking = GradientInjection(model, penalty)          # once: finds the layer and the reference, checks both
        for batch in batches:
            with blocking(batch["labels"], normalizer=tokens):   # one forward of the model
                logits = model(**batch).logits
            (summed_loss(logits, batch["labels"]) / tokens).backward()

    The forward is untouched and so is your loss; its backward adds weight * dL/dh to the gradient of the hidden state,
    L = (sum over the batch's penalised tokens) / normalizer. So `normalizer` is what your loop divides the summed loss
    of this micro-batch by: the supervised tokens of the whole accumulated batch, or those of the micro-batch times the
    accumulation steps; divided by a GradScaler's scale where one multiplies the loss. It is not seen otherwise.

    model: with PEFT adapters for a live reference; the object that the loop calls, wrapped (DDP, torch.compile) or not.
    penalty: a BlockPenalty, another LossTerm or several; not one whose reference is a cache, whose rows only a
    trainer's batches name. `last` holds what the latest forward cost, without lambda: {column of the term: Tensor,
    "active_fraction": Tensor}, on the device; reading a value is the only synchronisation.

    Raises TypeError or ValueError at once for what does not fit the model; RuntimeError when the context ends, for a
    forward that did not come, came twice, or whose hidden state takes no gradient. Cost over the trainer's mix-in: one
    gradient tensor [B, S, d] a site, from the forward to the backward.
    """

    def __init__(self, model: nn.Module, penalty: LossTerm | Sequence[LossTerm]):
        self._terms = checked_terms(penalty)
        if not self._terms:
            raise TypeError("penalty: got none, expected a BlockPenalty, a KLPenalty or several")
        if isinstance(model, nn.DataParallel):
            raise ValueError("model: DataParallel is not supported: it splits a batch behind the loop's back; use DDP")
        for term in self._terms:
            if isinstance(term.reference, TokenStore):
                raise ValueError(
                    "penalty: its reference is a cache, whose rows are looked up by a trainer's batches; use "
                    'attach(trainer, penalty), or reference="live"'
                )
            term.check_model(model)
        keep_trainable(unwrap(model))
        self._model = model
        self._sites = {term.site: site_module(model, term.site) for term in self._terms}
        self._references = references_of(model, self._terms)
        self.last: dict[str, Tensor] = {}

    @contextmanager
    def __call__(
        self, labels: Tensor, *, normalizer: Tensor | float | Callable[[Tensor], Tensor | float]
    ) -> Iterator[None]:
        """One forward, whose hidden state's gradient gets the penalty's. labels [B, S], IGNORED where not supervised.

        normalizer: a number, or a function of the labels. Ends without effect when the block raises.
        """
        divisor = normalizer(labels) if callable(normalizer) else normalizer
        if not isinstance(divisor, Tensor) and not 0 < divisor < float("inf"):
            raise ValueError(f"normalizer: got {divisor!r}, expected a finite number above 0")
        forwards: list[torch.autocast] = []

        def notice(module, args, output):
            kind = args[0].device.type if args and isinstance(args[0], Tensor) else labels.device.type
            dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
            forwards.append(torch.autocast(kind, dtype, enabled))

        # Seen where the layers run, as an autocast region may begin anywhere around them.
        handle = next(iter(self._sites.values())).register_forward_hook(notice)
        try:
            with captured_forward(self._model, *self._sites.values()) as seen:
                yield
        finally:
            handle.remove()
        hidden = [checked_hidden(seen, self._sites[term.site], term, self._model) for term in self._terms]
        if len(forwards) > 1:
            raise RuntimeError(f"the model ran {len(forwards)} times in one context; open one for every forward")
        with forwards[0]:
            found = {
                source: reference.hidden_states(seen.args, seen.kwargs)
                for source, reference in self._references.items()
            }
        self.last = self._inject(seen, hidden, found, labels, divisor)

    def _inject(self, seen, hidden, found, labels, divisor) -> dict[str, Tensor]:
        values, active, pairs = {}, 0, 0
        for term, at_site in zip(self._terms, hidden, strict=True):
            h = at_site.detach().requires_grad_(bool(term.weight))
            with torch.enable_grad():
                measured = term.measure(h, found[term.reference][term.site], labels, seen.kwargs)
            if term.weight:
                (gradient,) = torch.autograd.grad(measured.total, h)
                scale = term.weight / divisor
                # A hook on the tensor that the later layers read is called once its gradient is complete.
                at_site.register_hook(lambda grad, g=gradient, s=scale: torch.add(grad, (g * s).to(grad.dtype)))
            values[term.column] = values.get(term.column, 0.0) + measured.total.detach() / divisor
            active, pairs = active + measured.active, pairs + measured.pairs
        if isinstance(pairs, Tensor):
            values["active_fraction"] = active / pairs.clamp(min=1)
        return values
