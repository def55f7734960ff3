"""The cache of a run's reference, from its configuration: what `lockin-fast cache` writes and shows."""

import dataclasses
from pathlib import Path
from typing import Any

from lockin_fast.blocking.write_cache import CacheSource, write_hidden_states, write_latents
from lockin_fast.cache import CacheError, open_cache
from lockin_fast.cache.noise import MAX_SPURIOUS_LOSS
from lockin_fast.cache.write import WriteSettings
from lockin_fast.config import Config, ConfigError
from lockin_fast.inputs import Inputs, check_files, open_inputs
from lockin_fast.progress import Progress, silent
from lockin_fast.sweep.plan import latent_files


def run_cache(config: Config, progress: Progress = silent) -> dict[str, Any]:
    """Write the cache of `data.train` to `cache.path`, or what is missing of it; return what there is to show.

    It holds the latents of every set that the configuration names, so that one cache serves a whole sweep; or hidden
    states in four bits. Under torchrun each process writes its share. Train and sweep read it with block.reference:
    cache. Raises ConfigError, RunError, CacheError or FloatingPointError, as `open_inputs` and `write_latents` do.
    """
    latents = _latent_files(config)
    if config.cache.kind == "latents" and not latents:
        raise ConfigError(
            "cache.latents: no latent set to cache; name files: [latents/causal.json], run discover first, or set "
            "cache.kind=hidden_states"
        )
    config.require("block.layer", "cache.path")
    check_files(config, "model", "data.train", *(("sae",) if latents else ()))
    live = dataclasses.replace(config, block=dataclasses.replace(config.block, reference="live", margin=None))
    inputs = open_inputs(live, latents)
    cache, block = config.cache, config.block
    settings = WriteSettings(batch_size=cache.batch_size, shard_tokens=cache.shard_tokens)
    source = CacheSource(inputs.model, block.layer, inputs.dataset, block.tokens, "bf16" if config.train.bf16 else "no")
    if cache.kind == "latents":
        write_latents(cache.path, source, inputs.sae, inputs.sae.latents, settings=settings, progress=progress)
    else:
        write_hidden_states(
            cache.path, source, outliers=cache.outliers, blocksize=cache.blocksize, settings=settings, progress=progress
        )
    return _summary(cache.path, inputs, settings)


def _latent_files(config: Config) -> dict[str, Path]:
    if config.cache.latents:
        stems = [path.stem for path in config.cache.latents]
        return {path.stem if stems.count(path.stem) == 1 else str(path): path for path in config.cache.latents}
    named = config.is_set("sweep.latents") or config.is_set("block.latents")
    files = latent_files(config) if named or config.output is not None else {}
    if config.sweep.latents and config.block.latents is not None:
        files |= {"block.latents": config.block.latents}
    return files


def _summary(path: Path, inputs: Inputs, settings: WriteSettings) -> dict[str, Any]:
    """What the cache holds, and how noisy each latent set is: the largest lambda whose spurious loss is small."""
    rank, world = settings.place
    try:
        cache = open_cache(path)
    except CacheError as error:
        if world == 1:
            raise
        return {"cache": path, "share": f"written by process {rank} of {world}; {error}", "sets": []}
    rows = []
    for name, latents in inputs.latents.items():
        noise = cache.reference(inputs.sae.rows(latents.indices)).noise()
        loss = noise.spurious_loss() * cache.manifest["tokens_per_target"]
        loss /= len(latents) if inputs.config.block.latent_reduction == "mean" else 1
        rows.append(
            {
                "latents": name,
                "count": len(latents),
                "sigma_median": float(noise.sigma.median()),
                "sigma_max": float(noise.sigma.max()),
                "largest_lambda": MAX_SPURIOUS_LOSS / loss if loss else float("inf"),
            }
        )
    return {
        "cache": path,
        "kind": cache.manifest["kind"].replace("_", " "),
        "tokens": len(cache),
        "files": cache.manifest["shards"] + 1,
        "megabytes": cache.nbytes / 1e6,
        "bytes_per_token": cache.nbytes / len(cache),
        "sets": rows,
    }
