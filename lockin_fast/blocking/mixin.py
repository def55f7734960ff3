"""The block penalty inside a Hugging Face style trainer."""

import math

import torch
from torch import Tensor, nn

from lockin_fast.blocking.layers import captured_forward, decoder_layer, unwrap
from lockin_fast.blocking.meter import LossMeter
from lockin_fast.blocking.penalty import BlockPenalty
from lockin_fast.blocking.reference import Reference
from lockin_fast.quantized import keep_trainable

IGNORED = -100  # the label of a token that is not supervised


class LatentBlockMixin:
    """Adds lambda * L_block to the loss of a `transformers.Trainer` or a subclass of it, such as TRL's SFTTrainer.

        class BlockSFTTrainer(LatentBlockMixin, SFTTrainer): ...
        BlockSFTTrainer(model, ..., penalty=BlockPenalty(sae, latents, layer, weight))

    In training, the decoder layer's output and the model's arguments are recorded during the one forward that the
    trainer makes; the penalty is computed after it. Its sum over tokens is divided by what the trainer divides its own
    loss by: the count of supervised targets of the whole accumulated batch over all processes, or the micro-batch's own
    where the trainer averages micro-batches. So 1x8, 2x4 and 8x1 train the same model. Evaluation is left alone.

    Logged with the trainer's loss = sft_loss + lambda * block_penalty: `sft_loss`, `block_penalty` (without lambda),
    `active_fraction` of (token, latent) pairs, `lambda`; one synchronisation per logging step.

    Raises ValueError before training for DataParallel, a dataset in which every label is masked, or a penalty that
    does not fit the model; RuntimeError when no gradient can reach the penalised layer; FloatingPointError when the
    loss is not finite, at the next logging step.
    """

    def __init__(self, *args, penalty: BlockPenalty | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self._set_penalty(penalty)

    def _set_penalty(self, penalty: BlockPenalty | None) -> None:
        if penalty is not None and not isinstance(penalty, BlockPenalty):
            raise TypeError(f"penalty: got {type(penalty).__name__}, expected a BlockPenalty")
        if penalty is not None:
            if self.args.n_gpu > 1:
                raise ValueError(
                    f"trainer: DataParallel over {self.args.n_gpu} GPUs is not supported: it splits a batch behind the "
                    "trainer's back; launch with torchrun or accelerate, or set CUDA_VISIBLE_DEVICES to one GPU"
                )
            penalty.check_model(self.model)
            keep_trainable(unwrap(self.model))  # the reference's pass and the trainer's evaluation run in eval mode
        self.block_penalty = penalty
        self._block_model = None
        self._loss_meter = LossMeter()

    def train(self, *args, **kwargs):
        check_supervised(self.train_dataset)
        self._loss_meter.reset()
        self._block_model = None  # adapters may have come or gone since the last time
        return super().train(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        options = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        # Evaluation calls this too, and is to show the plain loss.
        if not model.training:
            return super().compute_loss(model, inputs, **options)
        if self.block_penalty is None:
            result = super().compute_loss(model, inputs, **options)
            self._record(result[0] if return_outputs else result, num_items_in_batch)
            return result
        labels = inputs.get("labels")  # the trainer may take them out of the inputs
        self._find_sites(model)
        with captured_forward(model, self._block_layer) as seen:
            result = super().compute_loss(model, inputs, **options)
        sft_loss, *outputs = result if return_outputs else (result,)
        loss = self._add_penalty(sft_loss, seen, labels, num_items_in_batch)
        return (loss, *outputs) if return_outputs else loss

    def _find_sites(self, model: nn.Module) -> None:
        """The penalised layer and the reference inside this model; looked up once, since the search walks the model."""
        if self._block_model is not model:
            penalty = self.block_penalty
            live = penalty.reference == "live"
            self._block_layer = decoder_layer(model, penalty.layer)
            self._block_reference = Reference(model if live else penalty.reference, penalty.layer, adapters=live)
            self._block_model = model

    def _add_penalty(self, sft_loss: Tensor, seen, labels, num_items_in_batch) -> Tensor:
        penalty = self.block_penalty
        self._check_capture(seen)
        mask = token_mask(penalty.tokens, labels, seen.kwargs, seen.hidden)
        with self.accelerator.autocast():
            h_ref = self._block_reference.hidden_state(seen.args, seen.kwargs)
        measured = penalty(seen.hidden if penalty.weight else seen.hidden.detach(), h_ref=h_ref, mask=mask)
        scale = self._penalty_scale(labels, num_items_in_batch)
        mean = (measured.total * scale).to(sft_loss.device)
        self._record(sft_loss, num_items_in_batch, mean, measured.active, measured.tokens * len(penalty.latents))
        return sft_loss + penalty.weight * mean if penalty.weight else sft_loss

    def _check_capture(self, seen) -> None:
        layer = self.block_penalty.layer
        if seen.hidden is None or seen.kwargs is None:
            raise RuntimeError(
                f"layer {layer} of {type(unwrap(self.model)).__name__} was not seen in the trainer's forward; a "
                "compiled model hides it: train without torch_compile"
            )
        if self.block_penalty.weight and not seen.hidden.requires_grad:
            raise RuntimeError(
                f"the output of layer {layer} takes no gradient, so the penalty could change nothing: no parameter at "
                "or below that layer is trained, or reentrant activation checkpointing cuts it off (pass "
                'gradient_checkpointing_kwargs={"use_reentrant": False})'
            )

    def _scaled_for_accumulation(self, num_items_in_batch) -> bool:
        """Whether the trainer divides its loss by the count of the whole accumulated batch."""
        stated = getattr(self, "loss_is_scaled_for_ga", None)
        if stated is not None:
            return stated and num_items_in_batch is not None
        return num_items_in_batch is not None and bool(self.model_accepts_loss_kwargs or self.compute_loss_func)

    def _penalty_scale(self, labels: Tensor, num_items_in_batch) -> Tensor | float:
        """What the trainer multiplies a sum over tokens by to get its loss."""
        if not self._scaled_for_accumulation(num_items_in_batch):
            targets = labels[..., 1:] if getattr(self, "_loss_shifts_labels", True) else labels
            return 1.0 / (targets != IGNORED).sum().clamp(min=1)
        if self.args.average_tokens_across_devices:
            tensor_parallel = self.get_tp_size() if hasattr(self, "get_tp_size") else 1
            return self.accelerator.num_processes // tensor_parallel / num_items_in_batch
        return 1.0 / num_items_in_batch

    def _record(self, sft_loss: Tensor, num_items_in_batch, penalty=0.0, active=0, pairs=0) -> None:
        share = 1.0 / getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        # A loss that is not scaled yet is divided by the accumulation steps after compute_loss.
        part = 1.0 if self._scaled_for_accumulation(num_items_in_batch) else share
        self._loss_meter.add(sft_loss.detach() * part, penalty * part, active, pairs, share=share)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs or "train_loss" in logs:
            means = self._loss_meter.drain(self.accelerator.gather if self.args.world_size > 1 else None)
            for name in ("sft_loss", "block_penalty"):
                if not math.isfinite(means.get(name, 0.0)):
                    raise FloatingPointError(
                        f"{name} is {means[name]} within the steps up to {self.state.global_step}; training stopped. "
                        "Look for batches without a supervised token, too large a learning rate or lambda, or fp16"
                    )
            if means and self.block_penalty is not None:
                means["lambda"] = self.block_penalty.weight
            elif means:
                means = {"sft_loss": means["sft_loss"]}
            logs = {**logs, **means}
        super().log(logs, *args, **kwargs)


def attach(trainer, penalty: BlockPenalty):
    """Give an existing trainer the block penalty, in place, and return it; called again, the penalty is replaced.

    The trainer's class becomes a subclass of itself and `LatentBlockMixin`, so its own compute_loss, callbacks and
    state stay. Raises TypeError for something that is no trainer, and what `LatentBlockMixin` raises.
    """
    cls = type(trainer)
    if not all(hasattr(trainer, name) for name in ("compute_loss", "accelerator", "args", "model")):
        raise TypeError(f"trainer: got {cls.__name__}, expected a transformers Trainer or a subclass of it")
    if isinstance(trainer, LatentBlockMixin):
        trainer._set_penalty(penalty)
        return trainer
    if not isinstance(penalty, BlockPenalty):
        raise TypeError(f"penalty: got {type(penalty).__name__}, expected a BlockPenalty")
    trainer.__class__ = type(f"Block{cls.__name__}", (LatentBlockMixin, cls), {"__module__": cls.__module__})
    try:
        trainer._set_penalty(penalty)
    except BaseException:
        trainer.__class__ = cls
        raise
    return trainer


def token_mask(tokens: str, labels: Tensor | None, kwargs: dict, hidden: Tensor) -> Tensor:
    """Which tokens are penalised: bool, the leading shape of hidden [B, S, d].

    "supervised": the token's own label is not -100. "all": every token the attention mask keeps, or every token where
    there is none (padding-free batches).
    """
    if labels is None:
        raise ValueError("labels: the batch has none; the penalty needs them to find and count supervised tokens")
    shape = hidden.shape[:-1]
    if labels.shape != shape:
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)}, expected that of the penalised layer's tokens, {tuple(shape)}; "
            "adapters that add virtual tokens are not supported"
        )
    if tokens == "supervised":
        return (labels != IGNORED).to(hidden.device)
    attention = kwargs.get("attention_mask")
    if attention is None:
        return torch.ones(shape, dtype=torch.bool, device=hidden.device)
    if attention.shape != shape:
        raise ValueError(f'attention_mask: got shape {tuple(attention.shape)}; tokens="all" needs {tuple(shape)}')
    return attention.to(hidden.device, torch.bool)


def check_supervised(dataset) -> None:
    """Raise ValueError when the dataset is empty or no row has a supervised token. Stops at the first row that has one.

    Iterable datasets, and rows whose labels only the collator makes, are left to the trainer.
    """
    if dataset is None or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return
    if len(dataset) == 0:
        raise ValueError("train_dataset: got an empty dataset, expected at least one row")
    for i in range(len(dataset)):
        row = dataset[i]
        labels = row.get("labels") if hasattr(row, "get") else None
        if labels is None or bool((torch.as_tensor(labels) != IGNORED).any()):
            return
    raise ValueError(
        f"train_dataset: every label of its {len(dataset)} rows is {IGNORED}, so there is nothing to learn; check the "
        "chat template's assistant mask, and max_length"
    )
