"""Fine-tuning N LoRA adapters together on one frozen base model."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lockin_fast.blocking.mixin import checked_terms
from lockin_fast.blocking.terms import LossTerm
from lockin_fast.chat import ChatDataset, PaddingCollator, digest
from lockin_fast.checkpoint import Checkpoint, check_same
from lockin_fast.labels import targets
from lockin_fast.lora import LoraSettings, check_lora, is_checkpointing, start_checkpointing, stop_checkpointing
from lockin_fast.quantized import keep_trainable
from lockin_fast.stacked.data import RowOrder, epochs_passed, micro_batches, total_steps
from lockin_fast.stacked.meter import StackedMeter, not_finite
from lockin_fast.stacked.objective import Objective
from lockin_fast.stacked.size import rows_of_a_forward, rows_of_an_adapter
from lockin_fast.stacked.stack import AdapterStack, check_same_lora
from lockin_fast.train import (
    DEFAULT_LORA,
    DEFAULT_SETTINGS,
    TrainSettings,
    check_reach,
    padding_id,
)
from lockin_fast.watching import peak_bytes, reset_peak


@dataclass(frozen=True)
class Member:
    """One adapter of a stack: its name in messages, its seed (weights and order of the data), its loss terms."""

    name: str
    seed: int = 0
    penalty: LossTerm | Sequence[LossTerm] | None = None
    lora: LoraSettings = DEFAULT_LORA


@dataclass
class MemberResult:
    """How one adapter fared: its history as in `TrainResult`, and why it was dropped, None if it was not."""

    history: list[dict] = field(default_factory=list)
    failure: str | None = None


@dataclass(frozen=True)
class StackResult:
    """A finished stack: a result a member in the order given, and the adapters of those that were not dropped.

    seconds_per_step: wall clock of a step of all adapters together, without the first; peak_bytes as in `TrainResult`.
    """

    members: list[MemberResult]
    stack: AdapterStack
    seconds_per_step: float
    peak_bytes: int | None


def train_stack(
    model: nn.Module, tokenizer, dataset: ChatDataset, members: Sequence[Member], *,
    settings: TrainSettings = DEFAULT_SETTINGS, checkpoint: Checkpoint | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> StackResult:  # fmt: skip
    """Train one adapter a member, all together; each comes out as `fine_tune` would have trained it, up to rounding.

    model, dataset: as for `fine_tune`; the model is handed back as it was. settings.seed is not used: a member's own
    seed draws its weights and the order of its data. micro_batch_size bounds the rows of a forward of all adapters (see
    `rows_of_a_forward`). checkpoint: what is written after a step whenever it is due and after the last, and what a
    later call with the same members goes on from, to the same bytes, or one with some of them; the caller removes it.
    progress(step, total) is called after every step.

    An adapter whose loss or gradient is not finite is dropped at the next logging step and says so in its `failure`.
    Nothing of it enters the others: up to that step they are, bit for bit, what they would be beside a healthy one;
    after it they go on as the smaller stack that they are.

    Raises ValueError, before training, for members that differ in their LoRA settings, for dropout, for a base layer
    that a stack cannot stand on, and for what `fine_tune` refuses; RunError for a checkpoint of something else. Needs
    the `train` extra.
    """
    if not members:
        raise ValueError("members: got none, expected at least one adapter to train")
    lora = check_same_lora({member.name: member.lora for member in members})
    check_lora(model, lora)
    for member in members:
        check_reach(lora, checked_terms(member.penalty))
    keep_trainable(model)
    run = _Run(model, PaddingCollator(padding_id(tokenizer)), dataset, members, lora, settings)
    if checkpoint is not None:
        run.restore(checkpoint)
    reset_peak(model.device)
    run.train(checkpoint, progress or (lambda step, total: None))
    return StackResult(run.results, run.stack, run.seconds / max(run.timed, 1), peak_bytes(model.device))


class _Run:
    """A stack in training: what there is to go on with after any step. `alive` are the members still in the stack."""

    def __init__(self, model, collate, dataset, members, lora, settings):
        self._model, self._collate, self._dataset, self._settings = model, collate, dataset, settings
        self._members, self.results = list(members), [MemberResult() for _ in members]
        self._terms = [checked_terms(member.penalty) for member in members]
        self._targets = [int(targets(row["labels"]).sum()) for row in dataset]
        self._longest = max(len(row["input_ids"]) for row in dataset)
        self._digest = digest(dataset)
        self._orders = {seed: RowOrder(len(dataset), seed, settings) for seed in {m.seed: None for m in members}}
        self._total = total_steps(len(dataset), settings)
        self._factor = _schedule(settings, self._total)
        self._step, self.seconds, self.timed = 0, 0.0, 0
        stack = AdapterStack.fresh(model, lora, [member.seed for member in members])
        self._use(stack, range(len(members)))

    def _use(self, stack: AdapterStack, alive: Sequence[int], moments: dict[str, Tensor] | None = None) -> None:
        self.stack, self._alive = stack, list(alive)
        parameter = nn.Parameter(stack.weights)
        parameter.grad = stack.grads
        settings = self._settings
        self._optimizer = torch.optim.AdamW(
            [parameter], lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        if moments is not None:
            steps = torch.tensor(float(self._step), device=parameter.device)
            self._optimizer.state[parameter] = {"step": steps, **moments}
        self._meter = StackedMeter([self._terms[n] for n in self._alive], self._model.device)
        rows = rows_of_a_forward(self._model, self._longest, settings)
        self._micro = rows_of_an_adapter(len(stack), rows, settings)
        self._seeds = list(dict.fromkeys(self._members[n].seed for n in self._alive))
        self._of = [self._seeds.index(self._members[n].seed) for n in self._alive]

    def _moments(self) -> dict[str, Tensor]:
        (state,) = self._optimizer.state.values()
        return {name: state[name] for name in ("exp_avg", "exp_avg_sq")}

    def train(self, saved: Checkpoint | None, progress: Callable[[int, int], None]) -> None:
        """Go on to the last step; `saved` then holds the finished stack."""
        finished = self._step == self._total
        while self._step < self._total and self._alive:
            with self.stack.installed(), _checkpointing(self._model, self._settings.gradient_checkpointing):
                self._model.train()
                diverged = self._train(saved, progress)
            if diverged:
                self._drop(diverged)
        broken = [place for place, finite in enumerate(self.stack.weights.isfinite().all(1).tolist()) if not finite]
        for place in broken:
            self.results[self._alive[place]].failure = "its weights are not finite; lower the learning rate or lambda"
        if broken:
            self._drop(broken)
        if saved and not finished:
            saved.write(*self._state())

    def _train(self, saved, progress) -> list[int]:
        """Train to the end, or until members have diverged, which are returned: a place in the stack each."""
        objective = Objective(self._model, [self._terms[n] for n in self._alive], bf16=self._settings.bf16)
        diverged = []
        while self._step < self._total and not diverged:
            start = time.perf_counter()
            grad_norm, rate = self._optimise(objective)
            self._step += 1
            last = self._step == self._total
            if last or self._step % self._settings.logging_steps == 0:
                diverged = self._log(grad_norm, rate)
            if self._step > 1:
                self.seconds += time.perf_counter() - start
                self.timed += 1
            if saved and not diverged and not last and saved.due():
                saved.write(*self._state())
            progress(self._step, self._total)
        return diverged

    def _optimise(self, objective: Objective) -> tuple[Tensor, float]:
        """One optimiser step; the norm of each adapter's gradient before clipping [N], and the learning rate."""
        settings, stack = self._settings, self.stack
        rows = [self._orders[seed].rows(self._step) for seed in self._seeds]
        counts = [max(sum(self._targets[row] for row in batch), 1) for batch in rows]
        counts = torch.tensor([float(counts[d]) for d in self._of], device=self._model.device)
        for batch in micro_batches(self._dataset, rows, self._of, self._micro, self._collate):
            loss, terms = objective(batch, counts)
            loss.backward()
            self._meter.add(terms)
        self._meter.steps += 1
        norm = torch.linalg.vector_norm(stack.grads, dim=1)
        if settings.max_grad_norm > 0:
            stack.grads.mul_((settings.max_grad_norm / (norm + 1e-6)).clamp_(max=1.0)[:, None])
        rate = settings.learning_rate * self._factor(self._step)
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        stack.grads.zero_()
        return norm, rate

    def _log(self, grad_norm: Tensor, rate: float) -> list[int]:
        rows = self._meter.drain(grad_norm)
        diverged = []
        for place, (n, row) in enumerate(zip(self._alive, rows, strict=True)):
            name = not_finite(row)
            if name is not None:
                diverged.append(place)
                self.results[n].failure = (
                    f"{name} is {row[name]} within the steps up to {self._step}; the adapter was dropped. Look for "
                    "batches without a supervised token, too large a learning rate or lambda"
                )
            at = {"epoch": epochs_passed(len(self._dataset), self._step, self._settings), "step": self._step}
            loss, norm, *rest = row.items()
            self.results[n].history.append(dict([loss, norm, ("learning_rate", rate), *rest]) | at)
        return diverged

    def _drop(self, places: Sequence[int]) -> None:
        keep = [place for place in range(len(self._alive)) if place not in places]
        moments = {name: tensor[keep] for name, tensor in self._moments().items()}
        self._use(self.stack.take(keep), [self._alive[place] for place in keep], moments)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"weights": self.stack.weights, "sums": self._meter.sums, **self._moments()}
        return tensors, {
            "key": self._key(),
            "members": [self._identity(n) for n in range(len(self._members))],
            "alive": self._alive,
            "results": [[result.history, result.failure] for result in self.results],
            "step": self._step,
            "columns": self._meter.columns,
            "logged": self._meter.steps,
            "seconds": [self.seconds, self.timed],
        }

    def _key(self) -> dict[str, Any]:
        """What a state to go on from has to agree in."""
        settings = asdict(self._settings)
        for name in ("seed", "micro_batch_size", "gradient_checkpointing"):  # no part of what is trained
            del settings[name]
        return {"train": settings, "lora": asdict(self.stack.lora), "data": self._digest}

    def _identity(self, n: int) -> dict[str, Any]:
        member = self._members[n]
        terms = [[term.column, term.site, term.weight] for term in self._terms[n]]
        return {"name": member.name, "seed": member.seed, "terms": terms}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to where the checkpoint stood, if there is one, with those of its adapters that are members."""
        found = checkpoint.read(self._model.device)
        if found is None:
            return
        tensors, state = found
        check_same(checkpoint.source, state["key"], self._key())
        stored = {member["name"]: place for place, member in enumerate(state["members"])}
        of = [stored.get(member.name) for member in self._members]
        for n, place in enumerate(of):
            known = {} if place is None else state["members"][place]
            check_same(checkpoint.source, known, self._identity(n))
        self.results = [MemberResult(*state["results"][place]) for place in of]
        alive = [n for n, result in enumerate(self.results) if result.failure is None]
        rows = [state["alive"].index(of[n]) for n in alive]
        self._step = state["step"]
        self.seconds, self.timed = state["seconds"]
        stack = AdapterStack(self._model, self.stack.lora, tensors["weights"][rows], self.stack.names)
        self._use(stack, alive, {name: tensors[name][rows] for name in ("exp_avg", "exp_avg_sq")})
        columns = [state["columns"].index(name) for name in self._meter.columns]
        self._meter.sums, self._meter.steps = tensors["sums"][columns][:, rows], state["logged"]


@contextmanager
def _checkpointing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Activation checkpointing inside the context, as `fine_tune` has it."""
    if not wanted or is_checkpointing(model):
        yield
        return
    start_checkpointing(model)
    try:
        yield
    finally:
        stop_checkpointing(model)


def _schedule(settings: TrainSettings, total: int) -> Callable[[int], float]:
    """The factor on the learning rate in the 0-based step, transformers' own."""
    from transformers import get_scheduler

    probe = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    made = get_scheduler(settings.schedule, probe, settings.warmup_steps, total)
    return made.lr_lambdas[0]
