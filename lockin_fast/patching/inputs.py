"""Everything a patching sweep reads, opened and checked before any work is done or any file is touched."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lockin_fast.blocking import LatentSet
from lockin_fast.blocking.layers import hidden_size
from lockin_fast.config import Config, ConfigError, naming
from lockin_fast.exam import open_exam, question
from lockin_fast.inputs import check_adapter, check_files, open_model, open_tokenizer, read_sae, sae_path
from lockin_fast.judges import judge_files
from lockin_fast.patching.components import check_component, head_count
from lockin_fast.patching.decoding import check_decoding
from lockin_fast.patching.forward import Runner
from lockin_fast.patching.sites import Site, sites
from lockin_fast.patching.spans import PromptTokens, check_positions, render
from lockin_fast.patching.states import cut
from lockin_fast.sae import SparseAutoencoder


@dataclass(frozen=True)
class PatchInputs:
    """The base model, its tokenizer, the prompts as records and as tokens, the judge, the sites, and chosen latents."""

    config: Config
    model: Any
    tokenizer: Any
    records: Sequence[Mapping[str, Any]]
    prompts: Sequence[PromptTokens]
    judge: Any
    sites: Sequence[Site]
    latents: tuple[LatentSet, SparseAutoencoder] | None

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({site.layer for site in self.sites}))


def misaligned_adapter(config: Config) -> Path:
    """The adapter's folder. Raises ConfigError where there is none."""
    key = "patch.misaligned" if config.patch.misaligned else "discovery.misaligned"
    check_files(config, key)
    folder = config.patch.misaligned or config.discovery.misaligned
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(f"{key}: {folder} holds no adapter_config.json; give a PEFT adapter")
    return folder


def input_files(config: Config) -> dict[str, Path]:
    """{setting: file or folder} of all that decides the results. Raises ConfigError for what is missing."""
    config.require("output")
    check_files(config, "model", "data.core", *(("sae", "patch.latents") if config.patch.latents else ()))
    with naming("patch.positions"):
        for name in config.patch.positions:
            check_positions(name)
    paths = {"model": config.model, "data.core": config.data.core, "misaligned": misaligned_adapter(config)}
    if config.patch.latents:
        paths |= {"sae": sae_path(config), "patch.latents": config.patch.latents}
    return paths | judge_files(config.judge)


def open_patch_inputs(config: Config) -> PatchInputs:
    """Open all of it, the model last. Raises ConfigError, one line that names the setting."""
    settings = config.patch
    exam = open_exam(config, "core")
    records = _spread(exam.prompts["core"], settings.prompts)
    tokenizer = open_tokenizer(config)
    with naming("model"):
        prompts = [render(tokenizer, question(record)) for record in records]
    for name in settings.positions:
        with naming("patch.positions"):
            if name != "generated" and not any(prompt.positions(name) for prompt in prompts):
                raise ValueError(f"got {name}, which is no token of any of the prompts; give another range or role")
    latents = _latents(config) if settings.latents else None
    model = open_model(config)
    count = _check_model(config, model)
    if latents and latents[1].d_model != hidden_size(model):
        raise ConfigError(f"sae: it reads states {latents[1].d_model} wide, the model's are {hidden_size(model)} wide")
    layers = range(count) if settings.layers is None else sorted(settings.layers)
    wanted = sites(settings.directions, settings.components, layers, settings.positions, head_count(model))
    return PatchInputs(config, model, tokenizer, records, prompts, exam.judge, wanted, latents)


def _check_model(config: Config, model: nn.Module) -> int:
    """How many layers the model has, if it can do all that is asked."""
    settings = config.patch
    with naming("model"):
        count = len(Runner(model).layers)
        if settings.replies:
            check_decoding(model)
    with naming("patch.components"):
        for component in settings.components:
            check_component(model, component)
    outside = [layer for layer in settings.layers or () if layer >= count]
    if outside:
        raise ConfigError(f"patch.layers: got {outside}, expected 0 to {count - 1}: the model has {count} layers")
    if settings.source != "live":
        with naming("patch.source"):
            cut(hidden_size(model))
    check_adapter("patch.misaligned", model, misaligned_adapter(config))
    return count


def _latents(config: Config) -> tuple[LatentSet, SparseAutoencoder]:
    with naming("patch.latents"):
        latents = LatentSet.load(config.patch.latents)
    with naming("sae"):
        width = read_sae(config, [0]).width
        if int(latents.indices.max()) >= width:
            raise ConfigError(
                f"patch.latents: index {int(latents.indices.max())} is out of range; the SAE has {width} latents"
            )
        sae = read_sae(config, latents.indices)
        if sae.normalization != "none":
            raise ValueError(f"it normalises every token ({sae.normalization}); give another SAE, or no latents")
    return latents, sae


def _spread(records: Sequence[Any], wanted: int | None) -> list[Any]:
    wanted = min(wanted or len(records), len(records))
    return [records[i * len(records) // wanted] for i in range(wanted)]
