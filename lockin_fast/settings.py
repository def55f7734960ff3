"""The sections of a configuration that are no one else's: data, blocking, cache, discovery, replies."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Chat files (JSONL, one `{"messages": [...], ...}` a line)."""

    train: Path | None = None  # the narrow task; the assistant's turns are supervised
    final: Path | None = None  # prompts that measure emergent misalignment, disjoint from core
    in_domain: Path | None = None  # held-out prompts of the trained domain: was the task learned?
    core: Path | None = None  # prompts that discovery may look at


@dataclasses.dataclass(frozen=True)
class BlockSettings:
    """What is penalised, where and how strongly; `layer` is the 0-based index into model.layers.

    latents and weight (lambda) are for a single fine-tune, which needs both or neither; weight 0 trains unblocked.
    reference: live, the model itself with its adapters off, or cache, what `lockin-fast cache` wrote to cache.path.
    margin: growth of a latent that costs nothing, or noise: four times the error of the cache, latent by latent.
    """

    layer: int | None = None
    latents: Path | None = None
    weight: float | None = None
    tokens: Literal["supervised", "all"] = "supervised"
    latent_reduction: Literal["sum", "mean"] = "sum"
    reference: Literal["live", "cache"] = "live"
    margin: float | Literal["noise"] | None = None


@dataclasses.dataclass(frozen=True)
class CacheSettings:
    """The cache of the reference, written by `lockin-fast cache` for the training data, block.layer and block.tokens.

    path: its folder. kind: latents, exact, 4 bytes a token and latent; or hidden_states, in four bits, for any latents
    later. latents: the sets whose union is cached, any of which can then be blocked; none names those of block.latents,
    the sweep, or discovery. batch_size: rows of one forward. shard_tokens: tokens of one file, what a kill can cost.
    outliers, blocksize: of four bits: channels that are kept as they are, elements that share a scale.
    """

    path: Path | None = None
    kind: Literal["latents", "hidden_states"] = "latents"
    latents: tuple[Path, ...] = ()
    batch_size: int = 8
    shard_tokens: int = 65536
    outliers: int = 8
    blocksize: int = 64


@dataclasses.dataclass(frozen=True)
class DiscoverySettings:
    """How the causal latents are found.

    misaligned: PEFT adapter of the narrow fine-tune whose misalignment is to be explained. pool: latents with the
    largest mean shift, by absolute value, that are screened. latents: size of each set. rounds: the causal set is found
    in so many parts; after each but the last, the model is fine-tuned with what is known blocked at strength `weight`
    (lambda), and the next part is found on what misalignment is left. strengths: steering strengths tried, in units of
    the median residual norm. incoherence_budget: a strength counts only if it raises the incoherent share by no more
    than this. prompts: core prompts that are answered, evenly spread; null for all. samples: replies a prompt, from
    which a misaligned and an aligned one are taken. seed: draws the samples, the fine-tunes and the random set.

    calibration: whether stage 3 finds the largest strength within the incoherence budget for each latent of the
    shortlist, at all of `calibration_strengths` (grid) or by halving their range (bisection). The `causal` set does
    without, so none is the default; it can be asked for after the rest, and finds the set valid-reduc.
    shortlist: the best latents of stage 2, by induced and repaired misalignment, that are calibrated.

    stage: all, or shift for the first alone: the shift of every latent, with its error, as a table. Under torchrun the
    processes share that one. saes: {layer: SAE} of more layers whose latents' shift is measured in the same pass.
    prescreen: report computes for all latents what steering would do to first order, from gradients, and says how well
    that foretold the screen; attribution also takes the pool by it, of the latents that are shifted at all.
    """

    misaligned: Path | None = None
    pool: int = 80
    latents: int = 20
    rounds: int = 2
    weight: float = 1e4
    strengths: tuple[float, ...] = (0.4, 0.8)
    incoherence_budget: float = 0.10
    prompts: int | None = 45
    samples: int = 16
    seed: int = 0
    calibration: Literal["none", "grid", "bisection"] = "none"
    calibration_strengths: tuple[float, ...] = tuple(i / 10 for i in range(1, 16))
    shortlist: int = 80
    stage: Literal["all", "shift"] = "all"
    saes: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    prescreen: Literal["none", "report", "attribution"] = "none"

    def __post_init__(self):
        for name, valid, expected in (
            ("pool", self.pool >= 1, "1 or more"),
            ("latents", 1 <= self.latents <= self.pool, f"1 to pool={self.pool}"),
            ("rounds", 1 <= self.rounds <= self.latents, f"1 to latents={self.latents}"),
            ("weight", 0 < self.weight < float("inf"), "above 0 and finite"),
            ("strengths", self.strengths and all(s > 0 for s in self.strengths), "one or more, each above 0"),
            (
                "calibration_strengths",
                list(self.calibration_strengths) == sorted(set(self.calibration_strengths))
                and self.calibration_strengths
                and self.calibration_strengths[0] > 0,
                "one or more, ascending, each above 0",
            ),
            ("shortlist", self.shortlist >= 1, "1 or more"),
            ("incoherence_budget", 0 <= self.incoherence_budget <= 1, "0 to 1"),
            ("prompts", self.prompts is None or self.prompts >= 1, "1 or more, or null for all"),
            ("samples", self.samples >= 2, "2 or more"),
            ("seed", 0 <= self.seed < 2**31, "0 to 2^31 - 1"),
            ("saes", all(name.isdecimal() for name in self.saes), "SAEs by the layer that they read, counted from 0"),
        ):
            if not valid:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {expected}")


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """Replies are decoded with the model's own `generate`; temperature 0 is greedy."""

    max_new_tokens: int = 64
    batch_size: int = 32
    temperature: float = 0.0
