"""The checkpoints of a run: PEFT adapters with their steps, looked at before any of them is measured."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lockin_fast.config import ConfigError
from lockin_fast.lora import adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = "measure.checkpoints"
_STEP = re.compile(r"(?:.*\D)?(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """One adapter of a run, or with no folder the model without any."""

    step: int
    folder: Path | None

    @property
    def name(self) -> str:
        return "base" if self.folder is None else self.folder.name


def find_checkpoints(paths: Sequence[Path], steps: Mapping[str, int], *, base: bool) -> list[Checkpoint]:
    """The checkpoints in the order of their steps.

    paths: folders that hold an adapter, or folders of folders that do, named checkpoint-N. steps: {folder's name: its
    step}, where the name does not end in it. base: whether the model without an adapter is step 0.
    Raises ConfigError for a path that is missing or holds none, a name without a step, a step that two have (the base
    counts), and a name in `steps` that no folder has.
    """
    folders = list(itertools.chain.from_iterable(map(_adapters, paths)))
    if unknown := sorted(set(steps) - {folder.name for folder in folders}):
        raise ConfigError(f"measure.steps: no checkpoint is named {', '.join(unknown)}")
    found = [Checkpoint(0, None)] if base else []
    found += [Checkpoint(_step(folder, steps), folder) for folder in folders]
    if not found:
        raise ConfigError(f"{KEY}: none is given; name adapters, or a folder of checkpoint-N")
    found.sort(key=lambda one: one.step)
    for one, other in itertools.pairwise(found):
        if one.step == other.step:
            names = " and ".join(str(each.folder or "the base (measure.base)") for each in (one, other))
            raise ConfigError(f"{KEY}: step {one.step} is that of {names}; give measure.steps")
    return found


def check_adapter(model: Any, folder: Path) -> None:
    """Raise ConfigError, one line, unless the adapter was trained on a model of this shape.

    PEFT itself leaves out layers that the model lacks, and those that the file lacks untrained, without an error: the
    names of the weights must be the same, one by one.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file, adapter(model, folder) as adapted:
            stored = set(file.keys())
            expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    except Exception as error:  # PEFT's readers raise whatever they like, a line for every weight
        reason = " ".join(str(error).split())[:240]
        raise ConfigError(f"{KEY}: {folder} does not fit the model: {reason}") from error
    for kind, names in (("lacks", expected - stored), ("has also", stored - expected)):
        if names:
            raise ConfigError(
                f"{KEY}: {folder} is of another base: beside what fits the model it {kind} {len(names)} weights, such "
                f"as {min(names)}"
            )


def broken_weight(folder: Path) -> str | None:
    """The name of a weight of the adapter that is not finite; None where all are."""
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, framework="pt") as file:
        names = sorted(file.keys())
        return next((name for name in names if not bool(torch.isfinite(file.get_tensor(name)).all())), None)


def _adapters(path: Path) -> list[Path]:
    if not path.is_dir():
        raise ConfigError(f"{KEY}: no such folder: {path}")
    found = [path] if (path / CONFIG).is_file() else sorted(path.glob("checkpoint-*"))
    if not found:
        raise ConfigError(f"{KEY}: {path} holds neither {CONFIG} nor folders checkpoint-N")
    for folder in found:
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise ConfigError(f"{KEY}: {folder} holds no {name}; expected a PEFT adapter that was saved whole")
    return found


def _step(folder: Path, steps: Mapping[str, int]) -> int:
    if folder.name in steps:
        return steps[folder.name]
    if found := _STEP.fullmatch(folder.name):
        return int(found[1])
    raise ConfigError(f"{KEY}: the name of {folder} has no step; give measure.steps: {{{folder.name}: STEP}}")
