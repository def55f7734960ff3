"""The loss terms inside a Hugging Face style trainer."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from lockin_fast.blocking.fingerprint import check_cache
from lockin_fast.blocking.layers import captured_forward, is_compiled, site_module, unwrap
from lockin_fast.blocking.meter import LossMeter
from lockin_fast.blocking.penalty import BlockPenalty
from lockin_fast.blocking.reference import references_of
from lockin_fast.blocking.terms import LossTerm, checked_hidden, checked_terms, measure_terms
from lockin_fast.blocking.tokens import check_supervised
from lockin_fast.cache import TokenStore
from lockin_fast.cache.collate import ReferenceCollator, take_references
from lockin_fast.dispatch import fell_back
from lockin_fast.labels import IGNORED, targets
from lockin_fast.ops.gradient_tap import is_tapped
from lockin_fast.quantized import keep_trainable


class LatentBlockMixin:
    """Adds lambda * L_block to the loss of a `transformers.Trainer` or a subclass of it, such as TRL's SFTTrainer.

        class BlockSFTTrainer(LatentBlockMixin, SFTTrainer): ...
        BlockSFTTrainer(model, ..., penalty=BlockPenalty(sae, latents, layer, weight))

    penalty: one `LossTerm` or several: a BlockPenalty for every blocked layer, a KLPenalty. In training, the hidden
    states that they are about and the model's arguments are recorded during the one forward that the trainer makes; the
    terms are computed after it. Each sum over tokens is divided by what the trainer divides its own loss by: the count
    of supervised targets of the whole accumulated batch over all processes, or the micro-batch's own where the trainer
    averages micro-batches. So 1x8, 2x4 and 8x1 train the same model. Evaluation is left alone.

    Logged with the trainer's loss = sft_loss + lambda * block_penalty: `sft_loss`, `block_penalty` (without lambda),
    `active_fraction` of (token, latent) pairs, `lambda`; one synchronisation per logging step.

    Raises ValueError before training for DataParallel, a dataset in which every label is masked, or a penalty that
    does not fit the model; RuntimeError when no gradient can reach the penalised layer; FloatingPointError when the
    loss is not finite, at the next logging step.
    """

    def __init__(self, *args, penalty: LossTerm | Sequence[LossTerm] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self._set_penalty(penalty)

    def _set_penalty(self, penalty: LossTerm | Sequence[LossTerm] | None) -> None:
        terms = checked_terms(penalty)
        if terms and self.args.n_gpu > 1:
            raise ValueError(
                f"trainer: DataParallel over {self.args.n_gpu} GPUs is not supported: it splits a batch behind the "
                "trainer's back; launch with torchrun or accelerate, or set CUDA_VISIBLE_DEVICES to one GPU"
            )
        for term in terms:
            term.check_model(self.model)
            if isinstance(term.reference, TokenStore):
                check_cache(term.reference, self.model, term.site, self.accelerator.mixed_precision)
        if terms:
            keep_trainable(unwrap(self.model))  # the reference's pass and the trainer's evaluation run in eval mode
        self.loss_terms = terms
        self._bound_model = None
        self.loss_meter = LossMeter(tuple(dict.fromkeys(term.column for term in terms)))

    def train(self, *args, **kwargs):
        check_supervised(self.train_dataset)
        self.loss_meter.reset()
        self._bound_model = None  # adapters may have come or gone since the last time
        return super().train(*args, **kwargs)

    @property
    def _cached_terms(self) -> list[LossTerm]:
        return [term for term in self.loss_terms if isinstance(term.reference, TokenStore)]

    def get_train_dataloader(self):
        """The trainer's own, whose batches bring along what comes from a cache."""
        collate = self.data_collator
        if terms := self._cached_terms:
            self.data_collator = ReferenceCollator(collate, [(term.cached, term.tokens) for term in terms])
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collate

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        options = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        # Evaluation calls this too, and is to show the plain loss.
        if not model.training:
            return super().compute_loss(model, inputs, **options)
        if not self.loss_terms:
            result = super().compute_loss(model, inputs, **options)
            self._record(result[0] if return_outputs else result, num_items_in_batch)
            return result
        labels = inputs.get("labels")  # the trainer may take them out of the inputs
        brought = dict(zip(self._cached_terms, take_references(inputs), strict=False))
        self._find_sites(model)
        with captured_forward(model, *self._sites.values()) as seen:
            result = super().compute_loss(model, inputs, **options)
        sft_loss, *outputs = result if return_outputs else (result,)
        loss = self._add_terms(sft_loss, seen, brought, labels, num_items_in_batch)
        return (loss, *outputs) if return_outputs else loss

    def _find_sites(self, model: nn.Module) -> None:
        """The sites and the references inside this model; looked up once, since the search walks the model."""
        if self._bound_model is model:
            return
        self._sites = {term.site: site_module(model, term.site) for term in self.loss_terms}
        self._references = references_of(model, self.loss_terms)
        self._compiled = is_compiled(model)
        self._bound_model = model

    def _add_terms(self, sft_loss: Tensor, seen, brought, labels, num_items_in_batch) -> Tensor:
        hidden_at = [checked_hidden(seen, self._sites[term.site], term, self.model) for term in self.loss_terms]
        if len(brought) != len(self._cached_terms):
            raise RuntimeError(
                "the batch brings no reference from the cache: it was not made by this trainer's get_train_dataloader()"
            )
        with self.accelerator.autocast():
            found = {
                source: reference.hidden_states(seen.args, seen.kwargs)
                for source, reference in self._references.items()
            }
        h_refs, inputs = [], []
        for term, hidden in zip(self.loss_terms, hidden_at, strict=True):
            here = {name: tensor.to(hidden.device) for name, tensor in brought.get(term, {}).items()}
            h_refs.append(here or found[term.reference][term.site])
            inputs.append(hidden if term.weight else hidden.detach())
            if term.weight and isinstance(term, BlockPenalty) and not is_tapped(hidden):
                self._count_untapped(hidden)
        scale = self._penalty_scale(labels, num_items_in_batch)
        sums = measure_terms(self.loss_terms, inputs, h_refs, labels, seen.kwargs, scale)
        self._record(sft_loss, num_items_in_batch, sums.values, sums.active, sums.pairs)
        for term, mean in zip(self.loss_terms, sums.means, strict=True):
            if term.weight:
                sft_loss = sft_loss + term.weight * mean.to(sft_loss.device)
        return sft_loss

    def _count_untapped(self, hidden: Tensor) -> None:
        """The penalty then makes a gradient [B, S, d] of its own, which costs memory and time, not correctness."""
        cause = "the model is compiled" if self._compiled else "reentrant activation checkpointing has no graph to tap"
        fell_back("latent_backward_", hidden.device.type, f"not added to the gradient that arrives: {cause}")

    def _scaled_for_accumulation(self, num_items_in_batch) -> bool:
        """Whether the trainer divides its loss by the count of the whole accumulated batch."""
        stated = getattr(self, "loss_is_scaled_for_ga", None)
        if stated is not None:
            return stated and num_items_in_batch is not None
        return num_items_in_batch is not None and bool(self.model_accepts_loss_kwargs or self.compute_loss_func)

    def _penalty_scale(self, labels: Tensor, num_items_in_batch) -> Tensor | float:
        """What the trainer multiplies a sum over tokens by to get its loss."""
        if not self._scaled_for_accumulation(num_items_in_batch):
            counted = targets(labels) if getattr(self, "_loss_shifts_labels", True) else labels != IGNORED
            return 1.0 / counted.sum().clamp(min=1)
        if self.args.average_tokens_across_devices:
            tensor_parallel = self.get_tp_size() if hasattr(self, "get_tp_size") else 1
            return self.accelerator.num_processes // tensor_parallel / num_items_in_batch
        return 1.0 / num_items_in_batch

    def _record(self, sft_loss: Tensor, num_items_in_batch, values=(), active=0, pairs=0) -> None:
        share = 1.0 / getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        # A loss that is not scaled yet is divided by the accumulation steps after compute_loss.
        part = 1.0 if self._scaled_for_accumulation(num_items_in_batch) else share
        losses = {name: value * part for name, value in {"sft_loss": sft_loss.detach(), **dict(values)}.items()}
        self.loss_meter.add(losses, active, pairs, share=share)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs or "train_loss" in logs:
            means = self.loss_meter.drain(self.accelerator.gather if self.args.world_size > 1 else None)
            for name, value in means.items():
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"{name} is {value} within the steps up to {self.state.global_step}; training stopped. "
                        "Look for batches without a supervised token, too large a learning rate or lambda, or fp16"
                    )
            if means:
                means |= {term.weight_column: term.weight for term in self.loss_terms}
            logs = {**logs, **means}
        super().log(logs, *args, **kwargs)


def attach(trainer, penalty: LossTerm | Sequence[LossTerm]):
    """Give an existing trainer one loss term or several, in place, and return it; called again, they are replaced.

    The trainer's class becomes a subclass of itself and `LatentBlockMixin`, so its own compute_loss, callbacks and
    state stay. Raises TypeError for something that is no trainer, and what `LatentBlockMixin` raises.
    """
    cls = type(trainer)
    if not all(hasattr(trainer, name) for name in ("compute_loss", "accelerator", "args", "model")):
        raise TypeError(f"trainer: got {cls.__name__}, expected a transformers Trainer or a subclass of it")
    if isinstance(trainer, LatentBlockMixin):
        trainer._set_penalty(penalty)
        return trainer
    checked_terms(penalty)
    trainer.__class__ = type(f"Block{cls.__name__}", (LatentBlockMixin, cls), {"__module__": cls.__module__})
    try:
        trainer._set_penalty(penalty)
    except BaseException:
        trainer.__class__ = cls
        raise
    return trainer
