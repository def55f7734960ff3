"""The settings of a sweep: what is blocked, which other methods it is compared with, and who runs it."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

Side = Literal["both", "positive", "negative", "shuffled"]
COMPUTED = ("shift", "pca")  # directions that are computed from the misaligned adapter


def no_value_twice(values: Collection) -> bool:
    """Whether the values are all different."""
    return len(set(values)) == len(values)


def is_name(name: str) -> bool:
    """Whether a latent set or a direction may be called so: names become folders, and columns of tables."""
    return name.replace("-", "").replace("_", "").isalnum() and name not in ("base", "baseline")


@dataclasses.dataclass(frozen=True)
class BlockedLayer:
    """One layer of several that are blocked at once: its 0-based index, the SAE of its output, and a latent set."""

    layer: int
    sae: Path
    latents: Path


@dataclasses.dataclass(frozen=True)
class BaselineSettings:
    """Competing methods, each setting trained and judged at every seed of the sweep like any trial.

    kl: lambda_KL of a penalty on the divergence from the base model's next-token distributions. kl_direction:
    model_to_base is KL(model || base), base_to_model is KL(base || model).
    steering: {directions: strengths} of preventative steering, strength * direction added to the residual stream while
    the model trains. ablation: directions that are projected out of it while the model trains (CAFT).
    Directions are the name of a latent set (the decoder rows of its latents; steering adds their signed sum, unit rows,
    at unit length), `shift` (the mean difference of the residual streams of `discovery.misaligned` and the base model
    over `data.core`), `pca` (the first `components` principal components of that difference over tokens; for ablation),
    or a name in `directions`: {name: file}, a tensor [d] or [n, d] in .safetensors or .pt, or [layers + 1, d] as
    persona vectors are published. layers: where steering and ablation act; empty is block.layer.
    frozen_above: lambdas at which every latent set is blocked with LoRA in the blocked layer and below only; 0 is that
    without blocking.
    """

    kl: tuple[float, ...] = ()
    kl_direction: Literal["model_to_base", "base_to_model"] = "model_to_base"
    steering: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    ablation: tuple[str, ...] = ()
    directions: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    components: int = 5
    layers: tuple[int, ...] = ()
    frozen_above: tuple[float, ...] = ()

    def __post_init__(self):
        strengths = tuple(value for values in self.steering.values() for value in values)
        lists = ("kl", "ablation", "layers", "frozen_above")
        for name, got, valid, expected in (
            ("kl", self.kl, all(0 < value < math.inf for value in self.kl), "values above 0 and finite"),
            ("frozen_above", self.frozen_above, all(0 <= v < math.inf for v in self.frozen_above), "0 or more, finite"),
            ("steering", strengths, all(v and abs(v) < math.inf for v in strengths), "finite strengths other than 0"),
            ("components", (self.components,), self.components >= 1, "1 or more"),
            ("layers", self.layers, all(layer >= 0 for layer in self.layers), "0-based indices of decoder layers"),
            *((name, getattr(self, name), no_value_twice(getattr(self, name)), "no value twice") for name in lists),
            *((f"steering.{name}", got, no_value_twice(got), "no value twice") for name, got in self.steering.items()),
        ):
            if not valid:
                raise ValueError(f"baselines.{name}: got {list(got)!r}, expected {expected}")
        for name in self.directions:
            if name in COMPUTED or not is_name(name):
                raise ValueError(
                    f"baselines.directions.{name}: directions are named with letters, digits, - and _, not "
                    f"{' or '.join(COMPUTED)}, base or baseline"
                )
        if "pca" in self.steering:
            raise ValueError("baselines.steering: pca is several directions, of no sign; steer with shift")

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of all directions that some trial needs."""
        return tuple(dict.fromkeys([*(name for name, strengths in self.steering.items() if strengths), *self.ablation]))


@dataclasses.dataclass(frozen=True)
class RaySettings:
    """What a trial takes of a Ray cluster, in Ray's words.

    num_cpus: cores reserved for one trial, and the threads it computes with. num_gpus: GPUs reserved for it, 0.5 puts
    two on one; null is one where the cluster has any. max_retries: how often a trial is tried again whose worker died.
    """

    num_cpus: float = 1
    num_gpus: float | None = None
    max_retries: int = 3

    def __post_init__(self):
        for name, valid, expected in (
            ("num_cpus", 0 < self.num_cpus < float("inf"), "above 0 and finite"),
            ("num_gpus", self.num_gpus is None or 0 <= self.num_gpus < float("inf"), "0 or more, or null"),
            ("max_retries", self.max_retries >= 0, "0 or more"),
        ):
            if not valid:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {expected}")


@dataclasses.dataclass(frozen=True)
class SweepSettings:
    """Every lambda x latent set x seed is one trial; the unblocked baseline of each seed is always added.

    sizes: of every set, its so many best latents; null is the whole set. sides: of those, which: `both`, the `positive`
    or the `negative` alone (K+, K-), or both with their signs `shuffled`. unions: {name: sets} that are blocked as one.
    layers: {name: [{layer, sae, latents}, ...]} are sets at other layers than block.layer, or at several at once, under
    one lambda; sizes and sides are not applied to them. stack: how many adapters train together on the one base model;
    1 trains one after the other; null is as many as have a row in one forward, 16 at most, and on Ray 1. engine: who
    runs the trials, this process or the tasks of a Ray cluster.
    """

    lambdas: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0)
    latents: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    sizes: tuple[int | None, ...] = (None,)
    sides: tuple[Side, ...] = ("both",)
    unions: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    layers: Mapping[str, tuple[BlockedLayer, ...]] = dataclasses.field(default_factory=dict)
    stack: int | None = None
    engine: Literal["in-process", "ray"] = "in-process"
    ray: RaySettings = RaySettings()

    def __post_init__(self):
        for name, valid, expected in (
            ("sizes", self.sizes and no_value_twice(self.sizes), "one or more, none twice; null is the whole set"),
            ("sizes", all(size is None or size >= 1 for size in self.sizes), "1 or more, or null for the whole set"),
            ("sides", self.sides and no_value_twice(self.sides), "one or more, none twice"),
        ):
            if not valid:
                raise ValueError(f"sweep.{name}: got {list(getattr(self, name))!r}, expected {expected}")
        if self.stack is not None and self.stack < 1:
            raise ValueError(f"sweep.stack: got {self.stack}, expected 1 or more, or null")
        for name, layers in self.layers.items():
            at = [blocked.layer for blocked in layers]
            if not at or min(at) < 0 or not no_value_twice(at):
                raise ValueError(f"sweep.layers.{name}: got the layers {at}, expected one or more from 0, none twice")
        for key, names in (("unions", self.unions), ("layers", self.layers), ("latents", self.latents)):
            for name in names:
                if not is_name(name):
                    raise ValueError(
                        f"sweep.{key}.{name}: a set is named with letters, digits, - and _, not base or baseline"
                    )
