"""Will it fit, and how long will a step take: predicted from a configuration, before anything is loaded."""

from dataclasses import dataclass, replace
from pathlib import Path

from lockin_fast.blocking import LatentSet
from lockin_fast.config import Config
from lockin_fast.plan.advice import Suggestion, advise
from lockin_fast.plan.device import Device, measured, read_device
from lockin_fast.plan.duration import Part, step_parts
from lockin_fast.plan.memory import Memory, Workload, predict
from lockin_fast.plan.shape import Shape, read_shape

__all__ = [
    "Device",
    "Memory",
    "Part",
    "Plan",
    "Shape",
    "Suggestion",
    "Workload",
    "make_plan",
    "measured",
    "read_device",
    "read_workload",
]


@dataclass(frozen=True)
class Plan:
    """A workload on a device: its memory at the peak, the parts of its step, and what to change if it does not fit."""

    work: Workload
    device: Device
    memory: Memory
    steps: list[Part]
    suggestions: list[Suggestion]
    changed: Workload  # with all suggestions

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.device.usable

    @property
    def seconds(self) -> float | None:
        """Of one optimiser step; None where the device's rates are not known."""
        parts = [part.seconds(self.device) for part in self.steps]
        return None if None in parts else sum(parts)


def make_plan(work: Workload, device: Device) -> Plan:
    suggestions, changed = advise(work, device.usable)
    return Plan(work, device, predict(work), step_parts(work), suggestions, changed)


def read_workload(config: Config, model: str | Path, **changes) -> Workload:
    """What `config` trains, on `model` (see `read_shape`); `changes` replace fields of the result.

    Rows count with their longest, `train.max_length`. K is the size of the set block.latents, or discovery.latents.
    Raises what `read_shape` raises, and ValueError for adapted modules or layers, or a blocked layer, that the model
    does not have.
    """
    shape, lora, train, block = read_shape(model), config.lora, config.train, config.block
    unknown = [name for name in lora.target_modules if name not in dict.fromkeys(part for part, _, _ in shape.linear)]
    if unknown:
        raise ValueError(f"lora.target_modules: the model's layers have no {', '.join(unknown)}")
    layers = [*(lora.layers or ()), *([block.layer] if block.layer is not None else [])]
    if outside := [layer for layer in layers if not 0 <= layer < shape.layers]:
        raise ValueError(f"layer {outside[0]} is out of range; the model has {shape.layers}, 0 to {shape.layers - 1}")
    chosen = LatentSet.load(block.latents).indices if block.latents is not None else range(config.discovery.latents)
    work = Workload(
        shape=shape,
        quantization=config.quantization,
        autocast=train.bf16,
        rank=lora.r,
        targets=tuple(lora.target_modules),
        layers=lora.layers,
        dropout=lora.dropout,
        dora=lora.use_dora,
        batch=train.batch_size,
        micro_batch=train.micro_batch_size or train.batch_size,
        length=train.max_length,
        checkpointing=train.gradient_checkpointing,
        reference=block.reference,
        layer=shape.layers // 2 if block.layer is None else block.layer,
        latents=len(chosen),
        stack=config.sweep.stack or 1,
    )
    return replace(work, **{name: value for name, value in changes.items() if value is not None})
