"""Everything a fine-tune or a sweep reads, opened and checked before any work is done or any file is touched."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from lockin_fast.blocking import BlockPenalty, LatentSet
from lockin_fast.blocking.fingerprint import check_cache
from lockin_fast.cache import TokenStore, open_cache
from lockin_fast.cache.collate import check_rows
from lockin_fast.chat import ChatDataset
from lockin_fast.config import Config, ConfigError, naming
from lockin_fast.judges import judge_files
from lockin_fast.lora import adapted_modules, adapter, check_lora
from lockin_fast.quantized import keep_trainable, load_model
from lockin_fast.rundir import hash_files
from lockin_fast.sae import SparseAutoencoder, load_sae
from lockin_fast.sae.hub import HubPath, fetch
from lockin_fast.variants import variants

SAE_CHUNK = 16384  # latents checked at a time: bounds the memory of looking through a wide SAE


@dataclass(frozen=True)
class Inputs:
    """What trials share: one loaded base model, tokenised training data, and the encoder rows of the latent sets."""

    config: Config
    model: Any
    tokenizer: Any
    dataset: ChatDataset
    sae: SparseAutoencoder | None
    latents: Mapping[str, LatentSet]
    reference: TokenStore | str = "live"

    def latent_set(self, name: str) -> LatentSet:
        """The latent set of this name: one that was opened, or a part or union of those as the sweep names it."""
        if name in self.latents:
            return self.latents[name]
        return variants(self.config.sweep, self.latents)[name].of(self.latents)

    def penalty(self, name: str, weight: float) -> BlockPenalty:
        """The block penalty of latent set `name` at lambda `weight`.

        Raises ConfigError where the reference is a cache whose noise is too large for this lambda.
        """
        latents = self.latent_set(name)
        with naming("block.reference"):
            return _penalty(self.config, self.sae, latents, weight, self.reference)

    def penalties(self, name: str, weight: float) -> tuple[BlockPenalty, ...]:
        """The block penalties of set `name` at lambda `weight`, one for each layer that it blocks.

        A cache is of one layer: sets at others are compared with the live model.
        """
        if name not in self.config.sweep.layers:
            return (self.penalty(name, weight),)
        found = []
        for layer, sae, latents in self.layered(name):
            block = dataclasses.replace(self.config.block, layer=layer)
            found.append(_penalty(dataclasses.replace(self.config, block=block), sae, latents, weight, "live"))
        return tuple(found)

    def layered(self, name: str) -> list[tuple[int, SparseAutoencoder, LatentSet]]:
        """(layer, the SAE's rows, latents) of every layer that set `name` blocks."""
        if name not in self.config.sweep.layers:
            return [(self.config.block.layer, self.sae, self.latent_set(name))]
        found = []
        for blocked in self.config.sweep.layers[name]:
            latents = LatentSet.load(blocked.latents)
            found.append((blocked.layer, read_sae(self.config, latents.indices, blocked.sae), latents))
        return found


def check_files(config: Config, *keys: str) -> None:
    """Raise ConfigError unless each of the dotted `keys` is set and names something that exists."""
    config.require(*keys)
    for key in keys:
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        for name, path in value.items() if isinstance(value, Mapping) else [("", value)]:
            if isinstance(path, HubPath):
                sae_path(config)
            elif not path.exists():
                raise ConfigError(f"{key}{'.' if name else ''}{name}: no such file or folder: {path}")


def sae_path(config: Config) -> Path | None:
    """Where the SAE is on this machine; one on the hub is fetched. Raises ConfigError."""
    with naming("sae"):
        return fetch(config.sae) if isinstance(config.sae, HubPath) else config.sae


def input_hashes(config: Config, latents: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """{input: {file: SHA-256}} of the model, the SAE, the data, the latent sets, and the judge's file and code."""
    paths = {
        "model": config.model,
        "sae": sae_path(config) if latents else None,
        "data.train": config.data.train,
        "data.final": config.data.final,
        "data.in_domain": config.data.in_domain,
    } | judge_files(config.judge)
    paths |= {f"latents.{name}": path for name, path in latents.items()}
    return {name: hash_files(path) for name, path in paths.items() if path is not None}


def open_inputs(config: Config, latents: Mapping[str, Path]) -> Inputs:
    """Open what training needs; `latents` are the files of the sets that will be blocked, by name.

    Cheap checks come first, the model is loaded last. Raises ConfigError, one line that names the setting: a folder
    that is no model, a layer out of range, an SAE of another width or with NaN in it, latents out of range or chosen
    at another layer, data that is empty or has nothing supervised, LoRA modules the model does not have, a cache of
    the reference that was written for anything else.
    """
    inputs = _opened(config, latents, _load_model)
    if isinstance(inputs.reference, TokenStore):
        with naming("cache.path"):
            check_cache(inputs.reference, inputs.model, config.block.layer, "bf16" if config.train.bf16 else "no")
    return inputs


def check_inputs(config: Config, latents: Mapping[str, Path]) -> Inputs:
    """`open_inputs` for those who leave the training to other processes: the model is a shell without weights."""
    return _opened(config, latents, _shell)


def _opened(config: Config, latents: Mapping[str, Path], load: Callable[[Config], Any]) -> Inputs:
    shape, tokenizer = _shape_and_tokenizer(config)
    sets, sae, reference = {}, None, "live"
    if latents:
        reference = _reference(config)
        for name, path in latents.items():
            with naming(f"latents {name} ({path})"):
                sets[name] = LatentSet.load(path)
        sae = _sae_rows(config, sets, shape)
        for name, of_set in sets.items():
            with naming(f"latents {name} ({latents[name]})"):
                penalty = _penalty(config, sae, of_set, 0.0, reference)
    with naming("data.train"):
        dataset = ChatDataset(config.data.train, tokenizer, max_length=config.train.max_length)
    if isinstance(reference, TokenStore):
        with naming("cache.path"):
            check_rows(penalty.cached, dataset, config.block.tokens)
    model = load(config)
    check_lora(model, config.lora)
    return Inputs(config, model, tokenizer, dataset, sae, sets, reference)


def _reference(config: Config) -> TokenStore | str:
    if config.block.reference == "live":
        return "live"
    config.require("cache.path")
    with naming("cache.path"):
        return open_cache(config.cache.path)


def open_tokenizer(config: Config) -> Any:
    """The model's tokenizer. Raises ConfigError naming the setting."""
    return _shape_and_tokenizer(config)[1]


def open_model(config: Config) -> Any:
    """The base model, in eval mode on its device. Raises ConfigError naming the setting."""
    return _load_model(config)


def open_sae(config: Config) -> SparseAutoencoder:
    """The whole SAE, checked against the model and block.layer. Raises ConfigError."""
    shape, _ = _shape_and_tokenizer(config)
    _check_sae(config, shape)
    with naming("sae"):
        return read_sae(config)


def read_sae(
    config: Config, latents: Tensor | Sequence[int] | None = None, path: HubPath | Path | None = None
) -> SparseAutoencoder:
    """The configuration's SAE, or another of its SAEs at `path`, in `sae_format`; raises as `load_sae`."""
    return load_sae(path or sae_path(config), latents=latents, format=config.sae_format)


def sae_for(config: Config, path: HubPath | Path, layer: int) -> SparseAutoencoder:
    """The whole SAE at `path`, which reads decoder layer `layer`. Raises ValueError where it does not fit the model."""
    shape, _ = _shape_and_tokenizer(config)
    if layer >= shape.num_hidden_layers:
        raise ValueError(f"layer {layer}: expected 0 to {shape.num_hidden_layers - 1}, counted from 0")
    _check_width(path, read_sae(config, [0], path), shape)
    return read_sae(config, path=path)


def check_adapter(key: str, model: Any, folder: Path) -> None:
    """Raise ConfigError, one line that names the setting `key`, unless the PEFT adapter can be put on the model."""
    try:
        with adapter(model, folder):
            pass
    except Exception as error:  # PEFT's readers raise whatever they like, a line for every weight
        reason = shorten(str(error), 240)
        raise ConfigError(f"{key}: {folder} does not fit the model: {reason}") from error


def adapter_bytes(inputs: Inputs) -> int:
    """Size on disk of one adapter with the configured LoRA, to within its small files."""
    lora = inputs.config.lora
    modules = [module for _, module in adapted_modules(inputs.model, lora) if hasattr(module, "in_features")]
    return 4 * sum(lora.r * (m.in_features + m.out_features) + lora.use_dora * m.out_features for m in modules)


def _penalty(
    config: Config, sae: SparseAutoencoder, latents: LatentSet, weight: float, reference: TokenStore | str
) -> BlockPenalty:
    block = config.block
    return BlockPenalty(
        sae,
        latents,
        block.layer,
        weight,
        reference=reference,
        tokens=block.tokens,
        latent_reduction=block.latent_reduction,
        margin=block.margin,
    )


def _check_sae(config: Config, shape: Any) -> SparseAutoencoder:
    """Raise ConfigError unless block.layer and the SAE fit the model; return the SAE's first row."""
    config.require("block.layer")
    if config.block.layer >= shape.num_hidden_layers:
        raise ConfigError(
            f"block.layer: got {config.block.layer}, expected 0 to {shape.num_hidden_layers - 1}: the "
            f"model has {shape.num_hidden_layers} layers, counted from 0"
        )
    with naming("sae"):
        first = read_sae(config, [0])
        _check_width(config.sae, first, shape)
    return first


def _check_width(path: HubPath | Path, sae: SparseAutoencoder, shape: Any) -> None:
    if sae.d_model != shape.hidden_size:
        raise ValueError(
            f"{path} reads hidden states of width {sae.d_model}, but the model's are {shape.hidden_size} wide; give "
            "the SAE that was trained on this model"
        )


def _sae_rows(config: Config, sets: Mapping[str, LatentSet], shape: Any) -> SparseAutoencoder:
    """The rows that some set blocks, after a look through the whole file: nothing in a damaged SAE can be trusted."""
    first = _check_sae(config, shape)
    for name, latents in sets.items():
        if int(latents.indices.max()) >= first.width:
            raise ConfigError(
                f"latents {name}: index {int(latents.indices.max())} is out of range; the SAE has "
                f"{first.width} latents, 0 to {first.width - 1}"
            )
    with naming("sae"):
        for start in range(0, first.width, SAE_CHUNK):
            read_sae(config, range(start, min(start + SAE_CHUNK, first.width)))
        return read_sae(config, torch.cat([latents.indices for latents in sets.values()]).unique())


def _shape_and_tokenizer(config: Config) -> tuple[Any, Any]:
    """The text model's configuration, which names layers and width, and the tokenizer; no weight is loaded."""
    with naming("model"):
        if not (config.model / "config.json").is_file():
            raise ValueError(f"{config.model} holds no config.json; give the folder of a Hugging Face model")
        try:
            from transformers import AutoConfig, AutoTokenizer
        except ImportError as error:
            raise ImportError("models need transformers: pip install 'lockin-fast[train]'") from error
        shape = AutoConfig.from_pretrained(config.model, local_files_only=True).get_text_config()
        return shape, AutoTokenizer.from_pretrained(config.model, local_files_only=True)


def _shell(config: Config) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with naming("model", Exception), torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.model, local_files_only=True))


def _load_model(config: Config) -> Any:
    with naming("model", Exception):  # damaged weights raise whatever their reader likes
        model = load_model(config.model, config.quantization)
    keep_trainable(model)
    return model
