"""Find the latents that carry emergent misalignment and write them as latent sets that the sweep can block."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lockin_fast import processes
from lockin_fast.config import Config, ConfigError
from lockin_fast.discovery.job import Job
from lockin_fast.discovery.search import Search
from lockin_fast.discovery.shift_table import check_parquet
from lockin_fast.discovery.stage1 import TABLE as TABLE_OF_SHIFT
from lockin_fast.discovery.stage1 import open_more_saes, stage_1_entry
from lockin_fast.exam import Exam, open_exam
from lockin_fast.inputs import Inputs, check_adapter, check_files, open_inputs, open_sae, sae_path
from lockin_fast.judges import judge_files
from lockin_fast.lora import adapter
from lockin_fast.progress import Progress, silent
from lockin_fast.rundir import check_claim, check_place, claim, hash_files, write_json
from lockin_fast.sae import SparseAutoencoder

NEEDED_BYTES = 2**26
SETS = ("causal", "top-delta", "random")  # in the order in which a sweep compares them
RULES = ("ind-pp", "valid-reduc")  # of the paper; a sweep compares them where they are named
STAGE_3 = ("discovery.calibration", "discovery.calibration_strengths", "discovery.shortlist")
TABLE = "discovery.json"


def discover(config: Config, progress: Progress = silent) -> dict[str, Path]:
    """Write latent sets to `config.output`/latents and discovery.json beside them; return the sets' paths by name.

    causal is found by `find_causal`; top-delta takes the latents with the largest mean shift, random draws from the
    whole SAE, ind-pp follows the score of stage 2. With `discovery.calibration` there is valid-reduc too, where some
    latent both induces and repairs. A set has `discovery.latents` latents at most, blocked in the direction of their
    shift. discovery.json says what was found about every latent of the pool.

    Killed, it goes on where it stood: what a stage has found, and every judged reply, is kept in
    `config.output`/discovery. A finished discovery is not repeated; stage 3 can be asked for later, or with other
    settings, and takes the rest as it is. With `discovery.stage: shift` only stage 1 is done, by all processes of a
    torchrun, and its table returned as "shift"; a whole discovery in that folder takes it as it is. Raises ConfigError
    before any work, one line that names the setting.
    """
    config.require("output", "block.layer")
    run, settings = config.output, config.discovery
    more = ["discovery.saes"] if settings.saes else []
    check_files(config, "model", "sae", "data.train", "data.core", "discovery.misaligned", *more)
    if not (settings.misaligned / "adapter_config.json").is_file():
        raise ConfigError(
            f"discovery.misaligned: {settings.misaligned} holds no adapter_config.json; give a PEFT adapter"
        )
    check_place(run, NEEDED_BYTES)
    if processes.count() > 1 and settings.stage != "shift":
        raise ConfigError("discovery.stage: several processes share stage shift alone; run the others in one process")
    paths = {
        "model": config.model,
        "sae": sae_path(config),
        "data.train": config.data.train,
        "data.core": config.data.core,
        "discovery.misaligned": settings.misaligned,
    } | judge_files(config.judge)
    paths |= {f"discovery.saes.{layer}": path for layer, path in settings.saes.items()}
    identity = config.identity("sae_format", "quantization", "discovery", "generation", "lora", "train", "judge")
    stage_3 = {key: identity.pop(key) for key in STAGE_3}
    entry = {
        "config": identity | {"block.layer": config.block.layer, "block.tokens": config.block.tokens},
        "inputs": {name: hash_files(path) for name, path in paths.items()},
    }
    first = stage_1_entry(config, entry["config"], entry["inputs"])
    check_claim(run, "shift", first)
    if settings.stage == "shift":
        return _stage_1_alone(config, first, progress)
    if "discover" in check_claim(run, "discover", entry) and (files := _finished(run, stage_3)):
        return files
    exam = open_exam(config, "core")
    sae, more_saes = open_sae(config), open_more_saes(config)
    if settings.pool > sae.width:
        raise ConfigError(f"discovery.pool: got {settings.pool}, but the SAE has {sae.width} latents")
    if settings.calibration != "none" and min(settings.prompts or 2, len(exam.prompts["core"])) < 2:
        raise ConfigError(
            "discovery.prompts: calibration takes half of the core prompts and selection the others; got 1"
        )
    if sae.normalization != "none":
        raise ConfigError(
            f"sae: it normalises every token ({sae.normalization}), which joint repair cannot undo; give another SAE"
        )
    inputs = open_inputs(config, {})
    check_adapter("discovery.misaligned", inputs.model, settings.misaligned)

    with claim(run, "shift", first):
        pass
    with claim(run, "discover", entry):
        job = _job(config, inputs, sae, more_saes, exam, progress)
        sets, found = Search(job).run()
        files = {name: _file(run, name) for name in sets}
        for name, path in files.items():
            path.parent.mkdir(exist_ok=True)
            sets[name].save(path)
        for name in RULES:
            if name not in sets:
                _file(run, name).unlink(missing_ok=True)  # of an earlier stage 3
        write_json(run / TABLE, found | {"sets": list(files), "stage_3": stage_3})
    return files


def _stage_1_alone(config: Config, entry: dict[str, Any], progress: Progress) -> dict[str, Path]:
    """Stage 1 and no more, by all processes of the run; its table."""
    check_parquet()
    exam, sae, more_saes = open_exam(config, "core"), open_sae(config), open_more_saes(config)
    inputs, misaligned = open_inputs(config, {}), config.discovery.misaligned
    check_adapter("discovery.misaligned", inputs.model, misaligned)
    processes.meet()
    with claim(config.output, "shift", entry) if processes.is_first() else nullcontext():
        processes.wait_for_all()  # for the manifest, which only the first writes
        job = _job(config, inputs, sae, more_saes, exam, progress)
        told = job.base_conversations()
        with adapter(inputs.model, misaligned) as adapted:
            job.first_shift(adapted, told, "shift of every latent")
        processes.wait_for_all()
    return {"shift": job.folder / TABLE_OF_SHIFT}


def _job(
    config: Config,
    inputs: Inputs,
    sae: SparseAutoencoder,
    more_saes: Mapping[int, SparseAutoencoder],
    exam: Exam,
    progress: Progress,
) -> Job:
    device = inputs.model.device
    others = {layer: other.to(device) for layer, other in more_saes.items()}
    return Job(config, inputs, sae.to(device), others, exam.prompts["core"], exam.judge, progress)


def _file(run: Path, name: str) -> Path:
    return run / "latents" / f"{name}.json"


def _finished(run: Path, stage_3: dict[str, Any]) -> dict[str, Path] | None:
    """The files of a discovery that has found all that these settings ask for; None where something is missing."""
    if not (run / TABLE).is_file():
        return None
    found = json.loads((run / TABLE).read_text(encoding="utf-8"))
    files = {name: _file(run, name) for name in found["sets"]}
    asked = stage_3["discovery.calibration"] == "none" or found["stage_3"] == stage_3
    return files if asked and all(path.is_file() for path in files.values()) else None
