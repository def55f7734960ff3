"""The loss terms in a training loop of any kind: their gradient is added on the way back, the loss stays as it is."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lockin_fast.blocking.fingerprint import check_cache
from lockin_fast.blocking.layers import captured_forward, site_module, unwrap
from lockin_fast.blocking.reference import references_of
from lockin_fast.blocking.terms import LossTerm, checked_hidden, checked_terms, measure_terms
from lockin_fast.cache import TokenStore
from lockin_fast.cache.collate import references_of_batch
from lockin_fast.cache.manifest import REMEDY, check_same
from lockin_fast.quantized import keep_trainable

_PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


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
    penalty: a BlockPenalty, another LossTerm or several. What comes from a cache is looked up by the input_ids that the
    model is called with (attention_mask and position_ids where it gets them), which waits for them when they are on a
    GPU. `last` holds what the latest forward cost, without lambda: {column of the term: Tensor,
    "active_fraction": Tensor}, on the device; reading a value is the only synchronisation.

    Raises TypeError or ValueError at once for what does not fit the model; CacheError for a token that is not cached,
    or a forward in another precision than the cache's; RuntimeError when the context ends, for a
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
            term.check_model(model)
            if isinstance(term.reference, TokenStore):  # its precision is that of a forward, which is still to come
                check_cache(term.reference, model, term.site, term.reference.manifest["autocast"])
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
        forwards: list[tuple[str, torch.dtype, bool]] = []  # what each ran under, as torch.autocast takes it

        def notice(module, args, output):
            kind = args[0].device.type if args and isinstance(args[0], Tensor) else labels.device.type
            forwards.append((kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)))

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
        _, dtype, autocast = forwards[0]
        looked_up = self._look_up(seen.kwargs, labels, _PRECISIONS[dtype] if autocast else "no")
        with torch.autocast(*forwards[0]):
            found = {
                source: reference.hidden_states(seen.args, seen.kwargs)
                for source, reference in self._references.items()
            }
        h_refs = [
            {name: tensor.to(h.device) for name, tensor in looked_up[term].items()}
            if term in looked_up
            else found[term.reference][term.site]
            for term, h in zip(self._terms, hidden, strict=True)
        ]
        self.last = self._inject(seen, hidden, h_refs, labels, divisor)

    def _look_up(self, kwargs: dict, labels: Tensor, precision: str) -> dict[LossTerm, dict[str, Tensor]]:
        """What the caches hold of the batch, for every term that has one."""
        cached = [term for term in self._terms if isinstance(term.reference, TokenStore)]
        if not cached:
            return {}
        for term in cached:
            stored = {"autocast": term.reference.manifest["autocast"]}
            check_same(term.reference.path, stored, {"autocast": precision}, REMEDY)
        if kwargs.get("input_ids") is None:
            raise ValueError("input_ids: the model was called without, and a cache finds its tokens by them")
        names = ("input_ids", "attention_mask", "position_ids")
        batch = {name: kwargs[name] for name in names if kwargs.get(name) is not None} | {"labels": labels}
        taken = references_of_batch(batch, [(term.cached, term.tokens) for term in cached])
        return dict(zip(cached, taken, strict=True))

    def _inject(self, seen, hidden, h_refs, labels, divisor) -> dict[str, Tensor]:
        inputs = [h.detach().requires_grad_(bool(term.weight)) for term, h in zip(self._terms, hidden, strict=True)]
        with torch.enable_grad():
            sums = measure_terms(self._terms, inputs, h_refs, labels, seen.kwargs, 1.0 / divisor)
            costs = [term.weight * mean for term, mean in zip(self._terms, sums.means, strict=True)]
        for at_site, h, cost in zip(hidden, inputs, costs, strict=True):
            if h.requires_grad:
                (gradient,) = torch.autograd.grad(cost, h)
                # A hook on the tensor that the later layers read is called once its gradient is complete.
                at_site.register_hook(lambda grad, g=gradient: torch.add(grad, g.to(grad.dtype)))
        fraction = {"active_fraction": sums.active / sums.pairs.clamp(min=1)} if isinstance(sums.pairs, Tensor) else {}
        return sums.values | fraction
