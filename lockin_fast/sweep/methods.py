"""From a trial to what is done in its training: loss terms, interventions, and where LoRA may write."""

import dataclasses

from torch import Tensor

from lockin_fast.blocking import ConceptAblation, KLPenalty, PreventativeSteering
from lockin_fast.blocking.interventions import Intervention
from lockin_fast.blocking.layers import decoder_layers
from lockin_fast.blocking.terms import LossTerm
from lockin_fast.config import Config, ConfigError, naming
from lockin_fast.inputs import Inputs
from lockin_fast.lora import LoraSettings
from lockin_fast.sweep.directions import directions
from lockin_fast.sweep.plan import Trial
from lockin_fast.sweep_settings import COMPUTED
from lockin_fast.train import check_reach


@dataclasses.dataclass(frozen=True)
class Setup:
    """What one training consists of, beside data and optimiser."""

    lora: LoraSettings
    terms: tuple[LossTerm, ...] = ()
    interventions: tuple[Intervention, ...] = ()


def set_up(trial: Trial, inputs: Inputs) -> Setup:
    """The setup of a trial that trains. Directions that have to be computed are computed here."""
    lora, baselines = inputs.config.lora, inputs.config.baselines
    penalties = inputs.penalties(trial.latents, trial.weight) if trial.latents else ()
    if trial.method == "kl":
        return Setup(lora, (KLPenalty(inputs.model, trial.weight, direction=baselines.kl_direction),))
    if trial.method == "frozen_above":
        return Setup(_frozen_above(inputs, [p.layer for p in penalties]), penalties)
    if trial.method == "block":
        return Setup(lora, penalties)
    found = directions(inputs, trial.directions)
    return Setup(lora, interventions=tuple(_intervention(trial, inputs, *of_layer) for of_layer in found.items()))


def stackable(trial: Trial, config: Config) -> bool:
    """Whether the trial can train in one stack with others: by terms of the loss alone, and judged at its end."""
    return trial.weight is not None and trial.method in ("block", "kl") and not config.train.evaluate_epochs


def check_setups(trials: list[Trial], inputs: Inputs) -> None:
    """Raise ConfigError, one line that names the setting, for a trial that could not be set up. Computes no direction.

    Works on a model without weights.
    """
    penalties = {}
    for latents in dict.fromkeys(trial.latents for trial in trials if trial.latents):
        largest = max(trial.weight for trial in trials if trial.latents == latents)  # a cache may be too noisy for it
        with naming(f"latents {latents}"):
            penalties[latents] = inputs.penalties(latents, largest)
            for penalty in penalties[latents]:
                penalty.check_shape(inputs.model)
    for trial in trials:
        if trial.method == "kl":
            with naming("baselines.kl"):
                KLPenalty(inputs.model, trial.weight)
        elif trial.method == "frozen_above":
            with naming("baselines.frozen_above"):
                blocked = penalties.get(trial.latents, ())
                check_reach(_frozen_above(inputs, [penalty.layer for penalty in blocked]), blocked)
        elif trial.directions:
            with naming(f"baselines.{trial.method}"):
                for layer, rows in directions(inputs, trial.directions, compute=False).items():
                    _intervention(trial, inputs, layer, rows)
        elif trial.latents:
            with naming("lora.layers"):
                check_reach(inputs.config.lora, penalties[trial.latents])


def _frozen_above(inputs: Inputs, blocked: list[int]) -> LoraSettings:
    """LoRA in the highest blocked layer and below, block.layer where nothing is blocked."""
    lora, top = inputs.config.lora, max(blocked, default=inputs.config.block.layer)
    if top is None:
        raise ConfigError("block.layer: missing, and baselines.frozen_above freezes what is above it")
    layers = range(len(decoder_layers(inputs.model))) if lora.layers is None else lora.layers
    kept = tuple(layer for layer in layers if layer <= top)
    if not kept:
        raise ConfigError(f"lora.layers: all of {list(layers)} are above the blocked layer {top}; nothing would train")
    return dataclasses.replace(lora, layers=kept)


def _intervention(trial: Trial, inputs: Inputs, layer: int, rows: Tensor) -> Intervention:
    if trial.method == "ablation":
        return ConceptAblation(layer, rows)
    return PreventativeSteering(layer, _one_direction(trial.directions, rows, inputs), trial.weight)


def _one_direction(source: str, rows: Tensor, inputs: Inputs) -> Tensor:
    """What steering adds [d]: the one direction there is, or of a latent set its signed unit rows' sum, unit length."""
    if source in inputs.config.baselines.directions or source in COMPUTED:
        if len(rows) != 1:
            raise ConfigError(f"baselines.steering.{source}: got {len(rows)} directions, expected one to add")
        return rows[0]
    total = (rows / rows.norm(dim=1, keepdim=True)).sum(0)
    return total / total.norm()
