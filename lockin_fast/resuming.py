"""A fine-tune that was killed goes on from its checkpoint, to the same bytes."""

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lockin_fast.blocking.terms import LossTerm
from lockin_fast.chat import ChatDataset, digest
from lockin_fast.checkpoint import Checkpoint, check_same
from lockin_fast.lora import LoraSettings

MOMENTS = ("exp_avg", "exp_avg_sq")


def training_key(settings, lora: LoraSettings, dataset: ChatDataset, terms: Sequence[LossTerm]) -> dict[str, Any]:
    """What a state to go on from has to agree in; what changes memory and speed alone is left out."""
    from transformers import __version__

    train = dataclasses.asdict(settings)
    for name in ("micro_batch_size", "gradient_checkpointing"):
        del train[name]
    of_terms = [[term.column, term.site, term.weight] for term in terms]
    return {
        "train": train,
        "lora": dataclasses.asdict(lora),
        "data": digest(dataset),
        "terms": of_terms,
        "transformers": __version__,  # whose state is in it
    }


class Resumption:
    """A training that starts at its beginning, or where `checkpoint` stands.

    The state of an adapter (weights, the optimiser's moments, the schedule, torch's random state, the rows of the
    history and the sums of the next one) is written between two optimiser steps, after the first has been logged and
    before the second has drawn anything, and is put back at that very place: what transformers' Trainer does on its
    way there is overwritten.

    key: see `training_key`. Raises RunError for the state of another training.
    """

    def __init__(self, checkpoint: Checkpoint, key: Mapping[str, Any], device: torch.device):
        self._checkpoint, self._key = checkpoint, key
        self._tensors, self._state = checkpoint.read(device) or ({}, {})
        if self._state:
            check_same(checkpoint.source, self._state["key"], key)

    def train(self, trainer, watching, epochs: list[dict]) -> None:
        """Train to the end; trainer, its callback from `watching` and the rows of epochs are as if it had not stopped.

        A training that diverges leaves no checkpoint.
        """
        try:
            self._train(trainer, watching, epochs)
        except FloatingPointError:
            self._checkpoint.remove()  # to go on from there would be to diverge again
            raise

    def _train(self, trainer, watching, epochs: list[dict]) -> None:
        if self._state:
            watching.seconds, watching.timed, watching.first = self._state["seconds"]
            epochs[:] = self._state["epochs"]
        trainer.add_callback(self._saving(trainer, watching, epochs))
        if not self._state:
            trainer.train()
        else:
            with tempfile.TemporaryDirectory() as folder:
                trainer.model.save_pretrained(folder, save_embedding_layers=False)  # some has to be there
                state = json.dumps(self._state["trainer"])
                Path(folder, "trainer_state.json").write_text(state, encoding="utf-8")
                trainer.train(resume_from_checkpoint=folder)

    def _saving(self, trainer, watching, epochs):
        from transformers import TrainerCallback

        resumption = self

        class Saving(TrainerCallback):
            def __init__(self):
                self.to_restore = resumption._state
                self.epoch_began = False

            def on_train_begin(self, args, state, control, **kwargs):
                if self.to_restore:
                    resumption._restore(trainer)

            def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
                if self.to_restore:
                    # Older versions of accelerate draw the first epoch's order where batches are skipped.
                    train_dataloader.set_epoch(int(state.epoch))
                self.between_steps(state, "epochs")
                self.epoch_began = True  # and the data loader draws from the random state before its first step

            def on_step_begin(self, args, state, control, **kwargs):
                if not self.epoch_began or self.to_restore:
                    self.between_steps(state, "steps")
                self.epoch_began = False

            def between_steps(self, state, place):
                if not self.to_restore:
                    if state.global_step and resumption._checkpoint.due():
                        resumption._write(trainer, watching, epochs, place)
                elif self.to_restore["place"] == place:
                    resumption._put_random_state(trainer.model.device)
                    self.to_restore = None

        return Saving()

    def _write(self, trainer, watching, epochs, place: str) -> None:
        weights = _trained(trainer.model)
        moments = trainer.optimizer.state
        tensors = {"weights": _flat(weights), "random": torch.get_rng_state()}
        tensors |= {name: _flat([moments[weight][name] for weight in weights]) for name in MOMENTS}
        if trainer.model.device.type == "cuda":
            tensors["random_cuda"] = torch.cuda.get_rng_state(trainer.model.device)
        sums, logged = trainer.loss_meter.state()
        tensors |= {} if sums is None else {"sums": sums}
        state = {
            "key": self._key,
            "trainer": dataclasses.asdict(trainer.state),
            "schedule": trainer.lr_scheduler.state_dict(),
            "logged": logged,
            "seconds": [watching.seconds, watching.timed, watching.first],
            "epochs": epochs,
            "place": place,
        }
        self._checkpoint.write(tensors, state)

    def _restore(self, trainer) -> None:
        weights, optimizer = _trained(trainer.model), trainer.optimizer
        with torch.no_grad():
            for weight, part in zip(weights, _parts(self._tensors["weights"], weights), strict=True):
                weight.copy_(part)
        parts = {name: _parts(self._tensors[name], weights) for name in MOMENTS}
        step = torch.tensor(float(self._state["trainer"]["global_step"]))
        of_weight = {
            id(weight): {"step": step.clone(), **{name: parts[name][n].clone() for name in MOMENTS}}
            for n, weight in enumerate(weights)
        }
        order = [weight for group in optimizer.param_groups for weight in group["params"]]
        state = optimizer.state_dict()
        state["state"] = {n: of_weight[id(weight)] for n, weight in enumerate(order)}
        for group, rate in zip(state["param_groups"], self._state["schedule"]["_last_lr"], strict=True):
            group["lr"] = rate
        optimizer.load_state_dict(state)
        trainer.lr_scheduler.load_state_dict(self._state["schedule"])
        trainer.loss_meter.restore(self._tensors.get("sums"), self._state["logged"])

    def _put_random_state(self, device: torch.device) -> None:
        torch.set_rng_state(self._tensors["random"].cpu())
        if device.type == "cuda":
            torch.cuda.set_rng_state(self._tensors["random_cuda"].cpu(), device)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _parts(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """`flat` cut into tensors of the shapes of `like`."""
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]
