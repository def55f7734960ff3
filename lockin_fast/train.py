"""Fine-tuning one LoRA adapter on chat data, with or without the block penalty."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lockin_fast import processes
from lockin_fast.blocking.mixin import checked_terms
from lockin_fast.blocking.terms import LossTerm
from lockin_fast.chat import ChatDataset, PaddingCollator
from lockin_fast.lora import LoraSettings, borrowed_with_lora, check_lora, save_adapter
from lockin_fast.resuming import Resumption, training_key
from lockin_fast.rundir import held_partial
from lockin_fast.watching import Watch, peak_bytes, reset_peak, watching

_SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")


@dataclass(frozen=True)
class TrainSettings:
    """An AdamW fine-tune. Either `steps` optimiser steps, or `epochs` passes where steps is None.

    batch_size: rows of one optimiser step, shared by all processes; micro_batch_size: rows of one forward (None: all
    that fall to the process). Neither that nor the number of processes changes the result, but for rounding.
    gradient_checkpointing: keep no activations inside the layers, compute them again in the backward; less memory, a
    third more time, the same result. bf16: autocast, with weights as they are. logging_steps: optimiser steps averaged
    in one row of the history. evaluate_epochs: after every epoch, a trial of a sweep answers the prompts and is judged,
    so that what comes back in a long training shows.
    """

    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 64
    micro_batch_size: int | None = None
    gradient_checkpointing: bool = False
    learning_rate: float = 7.5e-5
    schedule: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 1024
    seed: int = 0
    bf16: bool = False
    logging_steps: int = 10
    evaluate_epochs: bool = False

    def __post_init__(self):
        def require(name, valid, expected):
            if not valid:
                raise ValueError(f"train.{name}: got {getattr(self, name)!r}, expected {expected}")

        require("steps", self.steps is None or self.steps >= 1, "1 or more, or none to count epochs")
        for name in ("epochs", "learning_rate"):
            require(name, getattr(self, name) > 0, "more than 0")
        for name in ("batch_size", "max_length", "logging_steps"):
            require(name, getattr(self, name) >= 1, "1 or more")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "seed"):
            require(name, getattr(self, name) >= 0, "0 or more")
        require("schedule", self.schedule in _SCHEDULES, f"one of {', '.join(_SCHEDULES)}")
        micro = self.micro_batch_size
        divides = micro is None or (micro >= 1 and self.batch_size % micro == 0)
        require("micro_batch_size", divides, f"a divisor of batch_size={self.batch_size}")


@dataclass(frozen=True)
class TrainResult:
    """One finished fine-tune.

    history: a row per logging step (step, loss, sft_loss, block_penalty, active_fraction, lambda, learning_rate,
    grad_norm), each the mean since the row before; sft_loss, penalty (without lambda) and active_fraction are those of
    the last row, None for the latter two without a penalty. seconds_per_step: wall clock, without the first step.
    peak_bytes: the peak during this run, of the GPU allocator or of the process' resident memory on a CPU; None where
    the system cannot tell (Linux can).
    """

    adapter_path: Path
    history: list[dict]
    seconds_per_step: float
    sft_loss: float
    penalty: float | None
    active_fraction: float | None
    peak_bytes: int | None


DEFAULT_LORA = LoraSettings()
DEFAULT_SETTINGS = TrainSettings()


def fine_tune(
    model: nn.Module, tokenizer, dataset, output: str | os.PathLike, *,
    lora: LoraSettings = DEFAULT_LORA, settings: TrainSettings = DEFAULT_SETTINGS,
    penalty: LossTerm | Sequence[LossTerm] | None = None, progress: Callable[[int, int], None] | Watch | None = None,
) -> TrainResult:  # fmt: skip
    """Train a LoRA adapter on `model` and write it to the folder `output` as an ordinary PEFT adapter.

    model: a causal language model without adapters. It is trained where it lies (CPU or GPU) and handed back as it
    was, bit for bit, also when training fails, so that one loaded model serves many runs. So is torch's random state.
    dataset: a path of chat JSONL, rows of one, or a ChatDataset (tokenise once, train often).
    output: must not exist; it appears whole, with metrics.jsonl, when training has succeeded, and not at all otherwise.
    penalty: one loss term or several; None trains plainly. progress(step, total) is called after every optimiser step;
    a `Watch` is told of epochs as well, and may name a checkpoint from which a killed call goes on to the same bytes
    (of one process; several start again). The caller removes it when the folder is where it belongs.

    The same seed on the same machine gives the same bytes. Raises before training: FileExistsError for an existing
    output; ValueError for modules or layers the model does not have, a model that has adapters already, or a penalty
    that does not fit; OSError where the adapter would not fit on the disk; RunError for a checkpoint of something else.
    Needs the `train` extra.

    Started by torchrun or `accelerate launch`, processes train one adapter under DistributedDataParallel: each takes
    its share of every batch, the first writes, and all return when it has. Where the rows of an epoch are no multiple
    of batch_size, accelerate fills its last batch up with rows from its start. Raises ValueError where batch_size
    cannot be shared, or the launcher asks for FSDP or DeepSpeed, under which no model can be handed back as it was.
    """
    try:
        import peft  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError("fine_tune needs transformers and peft: pip install 'lockin-fast[train]'") from error
    output = Path(output)
    processes.check_whole_model()
    _share(settings)
    check_lora(model, lora)
    terms = checked_terms(penalty)
    check_reach(lora, terms)
    if not isinstance(dataset, ChatDataset):
        dataset = ChatDataset(dataset, tokenizer, max_length=settings.max_length)
    if os.path.lexists(output):
        raise FileExistsError(f"output: {output} exists; choose another folder, or remove it first")
    watch = progress if isinstance(progress, Watch) else Watch(progress or (lambda step, total: None))
    resumption = None
    if watch.checkpoint is not None and processes.count() == 1:
        resumption = Resumption(watch.checkpoint, training_key(settings, lora, dataset, terms), model.device)
    with (
        _replacing_folder(output) if processes.is_first() else nullcontext(output) as partial,
        borrowed_with_lora(model, lora, settings.seed) as peft_model,
    ):
        if processes.is_first():
            _check_space(partial, peft_model)
        timer = watching(watch)
        trainer = _trainer(peft_model, tokenizer, dataset, partial, settings, penalty, timer)
        reset_peak(model.device)
        if resumption is None:
            trainer.train()
        else:
            resumption.train(trainer, timer, watch.epochs)
        peak = peak_bytes(model.device)
        history = [_with_total(row, terms) for row in trainer.state.log_history if "loss" in row]
        if processes.is_first():
            save_adapter(peft_model, partial)
            with open(partial / "metrics.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in history)
    processes.wait_for_all()
    last = history[-1]
    return TrainResult(
        adapter_path=output,
        history=history,
        seconds_per_step=timer.seconds_per_step(),
        sft_loss=last["sft_loss"],
        penalty=last.get("block_penalty"),
        active_fraction=last.get("active_fraction"),
        peak_bytes=peak,
    )


def _with_total(row: dict, terms: Sequence[LossTerm]) -> dict:
    """A row of the history, its loss the sum of its terms: the trainer's own counts from where it was resumed."""
    weights = {term.column: term.weight for term in terms}
    return row | {"loss": row["sft_loss"] + sum(weight * row[name] for name, weight in weights.items())}


def check_reach(lora: LoraSettings, terms: Sequence[LossTerm]) -> None:
    """Raise ValueError where every adapted layer is above the layer that a term penalises."""
    for term in terms:
        if lora.layers is not None and isinstance(term.site, int) and min(lora.layers) > term.site:
            raise ValueError(
                f"lora.layers: the lowest is {min(lora.layers)}, above the penalised layer {term.site}, so the penalty "
                "could change nothing"
            )


def padding_id(tokenizer) -> int:
    """The token that fills rows up to a batch's length; attention and loss leave it out, so any will do."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return pad if pad is not None else 0


@contextmanager
def _replacing_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` that becomes `output` when the context ends well, and is removed when it does not."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with held_partial(output, folder=True) as partial:
        yield partial
        os.replace(partial, output)


def _share(settings: TrainSettings) -> int:
    """Rows of one optimiser step for this process."""
    count = processes.count()
    if settings.batch_size % (count * (settings.micro_batch_size or 1)):
        rows = f" in forwards of {settings.micro_batch_size}" if settings.micro_batch_size else ""
        raise ValueError(
            f"train.batch_size: got {settings.batch_size} rows, which {count} processes cannot share evenly{rows}"
        )
    return settings.batch_size // count


def _check_space(folder: Path, peft_model: nn.Module) -> None:
    needed = sum(p.numel() * p.element_size() for p in peft_model.parameters() if p.requires_grad) + 2**20
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"output: {folder.parent} has {free / 1e6:.1f} MB free, the adapter needs {needed / 1e6:.1f} MB",
        )


def _trainer(peft_model, tokenizer, dataset, folder, settings, penalty, callback):
    """A BlockTrainer that prints nothing, reports nowhere, writes nothing, and reads the loss once a logging step."""
    from transformers import TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from lockin_fast.blocking.trainer import BlockTrainer

    share = _share(settings)
    micro = settings.micro_batch_size or share
    arguments = TrainingArguments(
        **_checkpointing(settings.gradient_checkpointing),
        output_dir=str(folder),
        use_cpu=peft_model.device.type == "cpu",
        max_steps=settings.steps or -1,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=share // micro,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        data_seed=settings.seed,
        bf16=settings.bf16,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,  # it reads the loss back every step, and hides what the meter reports
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # every adapter weight takes part in every forward
        dataloader_pin_memory=peft_model.device.type == "cuda",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one GPU: never DataParallel
    trainer = BlockTrainer(
        model=peft_model,
        args=arguments,
        train_dataset=dataset,
        data_collator=PaddingCollator(padding_id(tokenizer)),
        callbacks=[callback],
        penalty=penalty,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.floating_point_ops = lambda inputs: 0  # an estimate nobody reads, for a walk over the model every step
    return trainer


def _checkpointing(wanted: bool) -> dict:
    """The arguments of activation checkpointing, which newer versions of transformers call by another name."""
    from transformers import TrainingArguments

    known = TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    # The reentrant mode needs inputs that require grad, and cuts hooks of older versions off.
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if wanted else {}
