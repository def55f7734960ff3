"""One fine-tune from a configuration, with or without blocking: what `lockin-fast train` runs."""

import dataclasses
import json
from typing import Any

from lockin_fast import processes
from lockin_fast.checkpoint import Checkpoint
from lockin_fast.config import Config, ConfigError, naming
from lockin_fast.inputs import adapter_bytes, check_files, input_hashes, open_inputs
from lockin_fast.judge_settings import JudgeSettings
from lockin_fast.progress import Progress, silent
from lockin_fast.provenance import kernels, versions
from lockin_fast.rundir import (
    atomic_folder,
    check_claim,
    check_place,
    claim,
    read_json_lines,
    write_json,
    write_json_lines,
)
from lockin_fast.sweep.methods import Setup
from lockin_fast.sweep.run import SLACK_BYTES, STATES, write_config
from lockin_fast.sweep.trial import train_into
from lockin_fast.train import check_reach
from lockin_fast.watching import Watch

SECTIONS = ("sae_format", "quantization", "lora", "train", "block")


def run_training(config: Config, progress: Progress = silent) -> dict[str, Any]:
    """Train one adapter into `config.output`/adapter, an ordinary PEFT folder with result.json; return its result.

    Blocks `block.latents` at lambda `block.weight`; trains unblocked when neither is given, or weight is 0. A finished
    run is not repeated, one that was killed goes on from its checkpoint (that of several processes starts again), a run
    of other settings or inputs in the same folder is refused. Everything is checked before training. Raises as
    `run_sweep`.

    Started by torchrun, the processes train together, and the first holds the folder, writes and reports progress.
    """
    config.require("output")
    weight = config.block.weight or 0.0
    if config.block.weight is None and config.block.latents is not None:
        raise ConfigError("block.weight: missing, but block.latents is given; give a lambda, or 0 to train unblocked")
    blocked = weight > 0
    check_files(config, "model", "data.train", *(("sae", "block.latents") if blocked else ()))
    run, latents = config.output, {"block": config.block.latents} if blocked else {}
    check_place(run, SLACK_BYTES)
    needed = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, final=None, in_domain=None),
        judge=JudgeSettings(),
    )
    entry = {"config": config.identity(*SECTIONS), "inputs": input_hashes(needed, latents)}
    manifest = check_claim(run, "train", entry)
    done = run / "adapter" / "result.json"
    if "train" in manifest and done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    inputs = open_inputs(config, latents)
    penalties = (inputs.penalty("block", weight),) if blocked else ()
    with naming("lora.layers"):
        check_reach(config.lora, penalties)
    check_place(run, SLACK_BYTES + (1 + STATES) * adapter_bytes(inputs))
    setup = Setup(config.lora, penalties)
    named = {"adapter": str(run / "adapter"), "lambda": weight}
    if not processes.is_first():
        return named | train_into(run / "adapter", inputs, setup, config.train.seed, lambda step, total: None)

    with claim(run, "train", entry | {"versions": versions()}) as record:
        write_config(config, run)
        checkpoint = Checkpoint(run / ".adapter.safetensors")
        watch = Watch(lambda step, total: progress("training", step, total), checkpoint=checkpoint)
        with atomic_folder(run / "adapter") as partial:
            row = named | train_into(partial, inputs, setup, config.train.seed, watch)
            write_json(partial / "result.json", row)
        checkpoint.remove()
        record(kernels=kernels())
        write_json_lines(run / "metrics.jsonl", read_json_lines(run / "adapter" / "metrics.jsonl"))
        return row
