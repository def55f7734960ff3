"""The YAML configuration of a run, read into frozen dataclasses and checked before any work.

One file describes model, SAE, data, training, blocking and sweep; every command takes what it needs of it. Relative
paths, also those given with `--set`, are relative to the folder of the configuration file.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lockin_fast import typed_mapping
from lockin_fast.circuit_settings import CircuitSettings
from lockin_fast.judge_settings import NO_IDENTITY as JUDGE_NO_IDENTITY
from lockin_fast.judge_settings import JudgeSettings
from lockin_fast.measure_settings import MeasureSettings
from lockin_fast.paper_names import PAPER_NAMES, translate
from lockin_fast.patch_settings import PatchSettings
from lockin_fast.sae.formats import Format
from lockin_fast.sae.hub import HubPath, hub_path
from lockin_fast.settings import (
    BlockSettings,
    CacheSettings,
    DataSettings,
    DiscoverySettings,
    GenerationSettings,
)
from lockin_fast.sweep_settings import BaselineSettings, SweepSettings
from lockin_fast.train import LoraSettings, TrainSettings
from lockin_fast.typed_mapping import ConfigError

NO_IDENTITY = (  # settings that change memory and speed, or how far a run goes, not results
    "discovery.stage",
    "train.micro_batch_size",
    "train.gradient_checkpointing",
    "circuits.batch_size",
    "patch.circuits",
    "sweep.stack",
    "sweep.engine",
    "sweep.ray.num_cpus",
    "sweep.ray.num_gpus",
    "sweep.ray.max_retries",
    *(f"{section}.{name}" for section in ("judge", "judge.also") for name in JUDGE_NO_IDENTITY),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. `notes` tell the user how the file was read; they are no part of the run's identity.

    sae_format: of every SAE that is named, as `load_sae` calls them; null finds it from the files. llama_scope has two
    readings, of which llama_scope_openmoss, its authors', has to be asked for.
    quantization: how the base model's linear layers are held while adapters train on it: as the file has them, or by
    bitsandbytes in 4 bits (nf4, as QLoRA does) or 8.
    """

    model: Path | None = None
    sae: HubPath | Path | None = None  # [hf://]owner/name[@revision][/folder or file] on the hub; what exists here wins
    sae_format: Format | None = None
    output: Path | None = None
    quantization: Literal["none", "nf4", "int8"] = "none"
    data: DataSettings = DataSettings()
    lora: LoraSettings = LoraSettings()
    train: TrainSettings = TrainSettings()
    block: BlockSettings = BlockSettings()
    cache: CacheSettings = CacheSettings()
    discovery: DiscoverySettings = DiscoverySettings()
    patch: PatchSettings = PatchSettings()
    measure: MeasureSettings = MeasureSettings()
    sweep: SweepSettings = SweepSettings()
    baselines: BaselineSettings = BaselineSettings()
    generation: GenerationSettings = GenerationSettings()
    judge: JudgeSettings = JudgeSettings()
    circuits: CircuitSettings = CircuitSettings()
    notes: tuple[str, ...] = dataclasses.field(default=(), metadata={"hidden": True})

    def is_set(self, key: str) -> bool:
        """Whether the setting of this dotted key has a value: neither None nor an empty list or mapping."""
        value = dict(typed_mapping.leaves(self))[key]
        return value is not None and value not in ((), {})

    def require(self, *keys: str) -> None:
        """Raise ConfigError naming the first of the dotted `keys` that the configuration leaves out."""
        for key in keys:
            if not self.is_set(key):
                raise ConfigError(f"{key}: missing, and this command needs it; add it to the file or --set {key}=...")

    def resolved(self) -> dict[str, Any]:
        """Every setting, defaults included, paths absolute, in plain types: what a run keeps as its config.yaml."""
        return typed_mapping.plain(self)

    def identity(self, *sections: str) -> dict[str, Any]:
        """Flat {dotted key: value} of `sections`, without paths: files count by their content, not by their place.

        Without what changes memory and speed alone, either.
        """
        flat = {}
        for key, value in typed_mapping.leaves(self):
            setting = re.sub(r"\[\d+\]", "", key)
            if key.partition(".")[0] in sections and not isinstance(value, Path) and setting not in NO_IDENTITY:
                flat[key] = _without_paths(value)
        return flat


def _without_paths(value: Any) -> Any:
    """The value in plain types: of a mapping to paths its names alone, of anything else what is no path."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: _without_paths(child) for name, child in value.items() if not isinstance(child, Path)}
    if isinstance(value, Mapping):
        if any(isinstance(child, Path) for child in value.values()):
            return sorted(value)
        return {name: _without_paths(child) for name, child in value.items()}
    if isinstance(value, tuple):
        return [_without_paths(child) for child in value]
    return typed_mapping.plain(value)


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read the YAML file at `path` (None: defaults), apply `overrides` ("key.sub=value", YAML) and check all types.

    The names of the paper's scripts are accepted at the top level: block_latents_path, block_lambda, block_layer (their
    index into hidden_states: 20 is the output of model.layers[19]) and block_on_assistant_only.
    Raises ConfigError with one line that names the key: unreadable file, unknown key (with the nearest known one),
    wrong type, a setting given under both of its names.
    """
    values, notes = translate({} if path is None else _read(Path(path)), "")
    for override in overrides:
        key, value = _parse_override(override)
        if key in PAPER_NAMES:
            translated, more = translate({key: value}, "--set ")
            section, name = PAPER_NAMES[key].split(".")
            key, value, notes = PAPER_NAMES[key], translated[section][name], notes + more
        _set(values, key, value)
    folder = Path.cwd() if path is None else Path(path).resolve().parent
    if isinstance(sae := values.get("sae"), str):
        values["sae"] = hub_path(sae, folder) or sae
    config = typed_mapping.build(Config, values, folder=folder)
    _check(config)
    return dataclasses.replace(config, notes=tuple(notes))


@contextmanager
def naming(key: str, *others: type[Exception]) -> Iterator[None]:
    """Turn what a reader raises into a ConfigError that says which setting it came from."""
    try:
        yield
    except (ConfigError, ImportError):
        raise
    except (ValueError, OSError, *others) as error:
        line = " ".join(str(error).split())
        for name in (key, key.partition(".")[0], key.rpartition(".")[2]):  # what the reader calls its argument
            line = line.removeprefix(f"{name}: ")
        raise ConfigError(f"{key}: {line}") from error


def _read(path: Path) -> dict:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(values).__name__}")
    return values or {}


def _parse_override(text: str) -> tuple[str, Any]:
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text}: expected key=value, for example --set train.steps=200")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text}: the value is not valid YAML: {' '.join(str(error).split())}") from error


def _set(values: dict, key: str, value: Any) -> None:
    """Put `value` in the place that the dotted `key` names; what was there is replaced, not merged."""
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values = values[section]
    values[name] = value


def _check(config: Config) -> None:
    """Ranges that no type states; what needs a model or a file is checked when that is opened."""
    sweep, generation, weight, margin = config.sweep, config.generation, config.block.weight, config.block.margin
    rules = [
        ("block.layer", config.block.layer, config.block.layer is None or config.block.layer >= 0, "0 or more"),
        ("block.margin", margin, isinstance(margin, (str, type(None))) or 0 <= margin < float("inf"), "0 or more"),
        ("block.weight", weight, weight is None or 0 <= weight < float("inf"), "0 or more and finite"),
        (
            "sweep.lambdas",
            sweep.lambdas,
            all(0 < value < float("inf") for value in sweep.lambdas),
            "values above 0 (the baseline, lambda 0, is always run)",
        ),
        ("sweep.lambdas", sweep.lambdas, len(set(sweep.lambdas)) == len(sweep.lambdas), "no value twice"),
        (
            "sweep.seeds",
            sweep.seeds,
            sweep.seeds and len(set(sweep.seeds)) == len(sweep.seeds),
            "one or more, none twice",
        ),
        (
            "sweep.seeds",
            sweep.seeds,
            all(0 <= seed < 2**32 for seed in sweep.seeds),
            "whole numbers from 0 to 2^32 - 1",
        ),
        ("generation.max_new_tokens", generation.max_new_tokens, generation.max_new_tokens >= 1, "1 or more"),
        ("generation.batch_size", generation.batch_size, generation.batch_size >= 1, "1 or more"),
        ("generation.temperature", generation.temperature, 0 <= generation.temperature < float("inf"), "0 or more"),
    ]
    for key, value, holds, expected in rules:
        if not holds:
            raise ConfigError(f"{key}: expected {expected}, got {typed_mapping.plain(value)!r}")
