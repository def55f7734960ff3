"""Find the latents that carry emergent misalignment and write them as latent sets that the sweep can block."""

from pathlib import Path
from textwrap import shorten
from typing import Any

from lockin_fast.config import Config, ConfigError
from lockin_fast.discovery.search import Search
from lockin_fast.exam import open_exam
from lockin_fast.inputs import check_files, open_inputs, open_sae, sae_path
from lockin_fast.lora import adapter
from lockin_fast.progress import Progress, silent
from lockin_fast.rundir import check_claim, check_place, claim, hash_files, write_json

NEEDED_BYTES = 2**26
SETS = ("causal", "top-delta", "random")  # in the order in which a sweep compares them


def discover(config: Config, progress: Progress = silent) -> dict[str, Path]:
    """Write `config.output`/latents/{causal,top-delta,random}.json and discovery.json; return the sets' paths by name.

    causal is found by `Search.causal`; top-delta takes the latents with the largest mean shift, random draws from the
    whole SAE. Each set has `discovery.latents` latents, blocked in the direction of their shift. discovery.json says
    what was found about every latent of the pool. A finished discovery is not repeated.
    Raises ConfigError before any work, one line that names the setting.
    """
    config.require("output", "block.layer")
    check_files(config, "model", "sae", "data.train", "data.core", "discovery.misaligned")
    run, settings = config.output, config.discovery
    if not (settings.misaligned / "adapter_config.json").is_file():
        raise ConfigError(
            f"discovery.misaligned: {settings.misaligned} holds no adapter_config.json; give a PEFT adapter"
        )
    check_place(run, NEEDED_BYTES)
    paths = {
        "model": config.model,
        "sae": sae_path(config),
        "data.train": config.data.train,
        "data.core": config.data.core,
        "discovery.misaligned": settings.misaligned,
    } | ({"judge.path": config.judge.path} if config.judge.path else {})
    entry = {
        "config": config.identity("quantization", "discovery", "generation", "lora", "train")
        | {"block.layer": config.block.layer, "block.tokens": config.block.tokens},
        "inputs": {name: hash_files(path) for name, path in paths.items()},
    }
    files = {name: run / "latents" / f"{name}.json" for name in SETS}
    finished = all(path.is_file() for path in (run / "discovery.json", *files.values()))
    if "discover" in check_claim(run, "discover", entry) and finished:
        return files
    exam = open_exam(config, "core")
    sae = open_sae(config)
    if settings.pool > sae.width:
        raise ConfigError(f"discovery.pool: got {settings.pool}, but the SAE has {sae.width} latents")
    if sae.normalization != "none":
        raise ConfigError(
            f"sae: it normalises every token ({sae.normalization}), which joint repair cannot undo; give another SAE"
        )
    inputs = open_inputs(config, {})
    _check_adapter(inputs.model, settings.misaligned)

    with claim(run, "discover", entry):
        search = Search(config, inputs, sae.to(inputs.model.device), exam.prompts["core"], exam.judge, progress)
        sets, table = search.run()
        for name, path in files.items():
            path.parent.mkdir(exist_ok=True)
            sets[name].save(path)
        write_json(run / "discovery.json", table)
    return files


def _check_adapter(model: Any, folder: Path) -> None:
    """Raise ConfigError, one line, unless the adapter can be put on the model."""
    try:
        with adapter(model, folder):
            pass
    except Exception as error:  # PEFT's readers raise whatever they like, a line for every weight
        reason = shorten(str(error), 240)
        raise ConfigError(f"discovery.misaligned: {folder} does not fit the model: {reason}") from error
