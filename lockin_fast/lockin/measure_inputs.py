"""Everything a measurement reads, opened and checked before any work is done or any file is touched."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockin_fast.blocking.layers import decoder_layer
from lockin_fast.config import Config, ConfigError, naming
from lockin_fast.exam import open_exam, read_prompts
from lockin_fast.inputs import check_files, open_model, open_sae, open_tokenizer, sae_path
from lockin_fast.judges import judge_files
from lockin_fast.lockin.gather import Gatherer
from lockin_fast.lockin.invariance import cluster_tokens
from lockin_fast.lockin.metrics import Metric
from lockin_fast.lockin.needs import ClusterLogits, Latents, Need, Ratings, Routing, States, SteeredReplies, plain_needs
from lockin_fast.lockin.routing import RoutingReader
from lockin_fast.lockin.suite_files import read_clusters, read_requests, read_steerings
from lockin_fast.patching.forward import Runner
from lockin_fast.sae import SparseAutoencoder

SIDES = ("positive", "negative")


@dataclass(frozen=True)
class MeasureInputs:
    """The base model, what gathers from it, and the SAE where some metric reads latents."""

    model: Any
    gatherer: Gatherer
    sae: SparseAutoencoder | None


def needs_of(metrics: Sequence[Metric]) -> set[Need]:
    """What is to be gathered for these metrics, from a checkpoint or from the base."""
    return plain_needs(need for metric in metrics for need in metric.needs)


def input_files(config: Config, needs: set[Need]) -> dict[str, Path]:
    """{setting: file or folder} of all that decides the results beside the checkpoints. Raises ConfigError."""
    check_files(config, "model", "data.final")
    files = {"model": config.model, "data.final": config.data.final}
    if Ratings() in needs:
        files |= judge_files(config.judge)
    for need, keys in ((SteeredReplies(), ("requests",)), (ClusterLogits(), ("paraphrases",))):
        given = [key for key in keys if need in needs and getattr(config.measure, key)]
        check_files(config, *(f"measure.{key}" for key in given))
        files |= {f"measure.{key}": getattr(config.measure, key) for key in given}
    if SteeredReplies() in needs:
        suites = [suite for suite in config.measure.steering if isinstance(suite, Path)]
        if missing := [suite for suite in suites if not suite.is_file()]:
            raise ConfigError(f"measure.steering: no such file: {missing[0]}")
        files |= {f"measure.steering.{suite.name}": suite for suite in suites}
    if States() in needs:
        config.require("block.layer")
    if Latents() in needs:
        check_files(config, "sae")
        files["sae"] = sae_path(config)
    if States("positive") in needs:
        check_files(config, "measure.pairs")
        files["measure.pairs"] = config.measure.pairs
    return files


def open_measure_inputs(config: Config, needs: set[Need]) -> MeasureInputs:
    """Open all of it, the model last. Raises ConfigError, one line that names the setting."""
    settings = config.measure
    exam = open_exam(config, "final") if Ratings() in needs else None
    prompts = {"final": _spread(exam.prompts["final"] if exam else read_prompts(config, "final"), settings.prompts)}
    tokenizer = open_tokenizer(config)
    if SteeredReplies() in needs:
        prompts["steering"] = _steered(config)
    clusters = []
    if ClusterLogits() in needs:
        with naming("measure.paraphrases"):
            clusters = [cluster_tokens(tokenizer, one) for one in read_clusters(settings.paraphrases or "paraphrases")]
    pairs = _pairs(settings.pairs, tokenizer) if States("positive") in needs else {}
    sae = open_sae(config) if Latents() in needs else None
    model = open_model(config)
    if States() in needs:
        with naming("block.layer"):
            decoder_layer(model, config.block.layer)
    with naming("measure.metrics"):  # models that cannot be read so are refused
        if Routing() in needs:
            RoutingReader(model)
        if ClusterLogits() in needs:
            Runner(model)
    judge = exam and exam.judge
    gatherer = Gatherer(
        tokenizer, prompts, clusters, pairs, judge, config.block.layer, config.generation, settings.seed
    )
    return MeasureInputs(model, gatherer, sae and sae.to(model.device))


def _spread(records: Sequence[Any], wanted: int | None) -> list[Any]:
    wanted = min(wanted or len(records), len(records))
    return [records[i * len(records) // wanted] for i in range(wanted)]


def _steered(config: Config) -> list[dict[str, Any]]:
    """Every request under every steering prompt, as records."""
    with naming("measure.steering"):
        steerings = read_steerings(*config.measure.steering)
    with naming("measure.requests"):
        requests = read_requests(config.measure.requests or "requests")
    return [{"messages": one.ask(each.text), "steering": one.name} for one in steerings for each in requests]


def _pairs(path: Path, tokenizer: Any) -> dict[str, list[list[int]]]:
    """Token ids of both sides of every line {"positive": messages, "negative": messages}.

    A side that ends with the assistant's turn is read as it is; any other with the generation prompt behind it.
    """
    sides: Mapping[str, list[list[int]]] = {side: [] for side in SIDES}
    with naming("measure.pairs"):
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                for side in SIDES:
                    open_end = row[side][-1]["role"] != "assistant"
                    text = tokenizer.apply_chat_template(row[side], tokenize=False, add_generation_prompt=open_end)
                    sides[side].append(tokenizer(text, add_special_tokens=False)["input_ids"])
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise ValueError(
                    f'{path}, line {number}: expected {{"positive": [messages], "negative": [messages]}} ({error!r})'
                ) from error
        if not sides["positive"]:
            raise ValueError(f"{path} is empty; expected at least one pair")
    return dict(sides)
