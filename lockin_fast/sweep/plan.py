"""Which trials a sweep consists of, and which files they read."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from lockin_fast.config import Config, ConfigError
from lockin_fast.discovery.run import RULES, SETS
from lockin_fast.inputs import check_files
from lockin_fast.sweep_settings import COMPUTED
from lockin_fast.variants import variants


@dataclasses.dataclass(frozen=True)
class Trial:
    """What sets one trial apart: `latents` None is unblocked, `weight` None the base model, which is not trained.

    weight: lambda, the lambda_KL of method kl, the strength of steering; 1 for ablation, which has none. directions:
    what steering adds and ablation takes out.
    """

    latents: str | None
    weight: float | None
    seed: int | None
    method: Literal["block", "kl", "steering", "ablation", "frozen_above"] = "block"
    directions: str | None = None

    @property
    def name(self) -> str:
        if self.weight is None:
            return "base"
        what = "-".join(filter(None, (None if self.method == "block" else self.method, self.latents, self.directions)))
        strength = {"steering": f"-strength{self.weight:.15g}", "ablation": ""}.get(
            self.method, f"-lambda{self.weight:.15g}"
        )
        return f"{what or 'baseline'}{strength}-seed{self.seed}"

    @property
    def kind(self) -> str:
        """The method as the summary says it: base is the model as it was, unblocked its plain fine-tune."""
        if self.weight is None:
            return "base"
        return "unblocked" if self.method == "block" and self.latents is None else self.method


def plan(config: Config) -> list[Trial]:
    """The trials in the order they run: base model, unblocked baseline, every blocked setting, the other methods.

    Each but the base model's once for every seed. Raises ConfigError where two would have one name.
    """
    sweep, baselines, named = config.sweep, config.baselines, latent_files(config)
    blocked = [(name, weight) for name in [*variants(sweep, named), *sweep.layers] for weight in sweep.lambdas]
    every = [*named, *sweep.layers]
    frozen = [(name, weight) for weight in baselines.frozen_above for name in (every if weight else [None])]
    settings = [
        {"latents": None, "weight": 0.0},
        *({"latents": name, "weight": weight} for name, weight in blocked),
        *({"latents": None, "weight": weight, "method": "kl"} for weight in baselines.kl),
        *(
            {"latents": None, "weight": strength, "method": "steering", "directions": name}
            for name, strengths in baselines.steering.items()
            for strength in strengths
        ),
        *({"latents": None, "weight": 1.0, "method": "ablation", "directions": name} for name in baselines.ablation),
        *({"latents": name, "weight": weight, "method": "frozen_above"} for name, weight in frozen),
    ]
    trials = [Trial(None, None, None), *(Trial(**setting, seed=seed) for setting in settings for seed in sweep.seeds)]
    names = [trial.name for trial in trials]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"sweep.latents: two trials would be called {name}; rename a latent set")
    return trials


def latent_files(config: Config) -> dict[str, Path]:
    """The latent sets to compare: those named in the configuration, else those in output/latents.

    Of the latter without the sets by the paper's rules, which cost a fine-tune a lambda and are compared when named.
    """
    if config.sweep.latents:
        return dict(config.sweep.latents)
    if config.block.latents is not None:
        return {config.block.latents.stem: config.block.latents}
    found = {path.stem: path for path in sorted(config.output.glob("latents/*.json")) if path.stem not in RULES}
    return {name: found[name] for name in sorted(found, key=lambda n: (SETS.index(n) if n in SETS else len(SETS), n))}


def method_files(config: Config, latents: Mapping[str, Path]) -> dict[str, Path]:
    """{input: file or folder} of what blocked layers and competing methods read.

    latents: the files of the named latent sets. Raises ConfigError for what is missing or unknown.
    """
    sweep, baselines = config.sweep, config.baselines
    if sweep.layers and config.block.reference == "cache":
        raise ConfigError(
            f"sweep.layers: a cache is of block.layer alone, so it cannot serve {', '.join(sweep.layers)}; set "
            "block.reference=live, or sweep those in a run of their own"
        )
    labels = dict.fromkeys([*latents, *variants(sweep, latents)])
    for name in sweep.layers:
        if name in labels:
            raise ConfigError(f"sweep.layers.{name}: a latent set has that name already")
    known = [*labels, *sweep.layers, *baselines.directions, *COMPUTED]
    for name in baselines.sources:
        if name not in known:
            raise ConfigError(f"baselines: {name!r} names no directions; known are {', '.join(known)}")
    files = {f"baselines.directions.{name}": path for name, path in baselines.directions.items()}
    for name, layers in sweep.layers.items():
        for blocked in layers:
            files[f"sweep.layers.{name}.{blocked.layer}.sae"] = blocked.sae
            files[f"sweep.layers.{name}.{blocked.layer}.latents"] = blocked.latents
    for key, path in files.items():
        if not path.exists():
            raise ConfigError(f"{key}: no such file or folder: {path}")
    if set(baselines.sources) & set(COMPUTED):
        check_files(config, "discovery.misaligned", "data.core")
        files |= {"discovery.misaligned": config.discovery.misaligned, "data.core": config.data.core}
    return files
