"""A patching sweep from its configuration: what `lockin-fast patch` does."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from lockin_fast.blocking.layers import hidden_size
from lockin_fast.blocking.write_cache import CacheSource, write_hidden_states
from lockin_fast.cache import open_cache
from lockin_fast.config import Config, ConfigError, naming
from lockin_fast.discovery.contrasts import pick_contrasts
from lockin_fast.discovery.kept import kept
from lockin_fast.exam import question
from lockin_fast.generation import decoding, generate
from lockin_fast.judges import rate
from lockin_fast.lora import adapter
from lockin_fast.patching.attribution import attributions
from lockin_fast.patching.decoding import Limits, ends_of
from lockin_fast.patching.forward import Runner
from lockin_fast.patching.inputs import PatchInputs, input_files, misaligned_adapter, open_patch_inputs
from lockin_fast.patching.latent_difference import LatentDifferences
from lockin_fast.patching.logit_difference import Contrast, differences
from lockin_fast.patching.replies import Cell, patched_replies
from lockin_fast.patching.reply_log import PatchLog
from lockin_fast.patching.sides import Sides
from lockin_fast.patching.sites import Site
from lockin_fast.patching.states import Cached, Clean, Dense, FourBit, Pass, Source, cut
from lockin_fast.patching.summary import summarise
from lockin_fast.progress import Progress, silent
from lockin_fast.provenance import versions
from lockin_fast.rundir import check_claim, check_place, claim, hash_files, write_json, write_text

FILE = "patching.json"
FOLDER = "patching"  # in the run, of what is kept meanwhile
NEEDED_BYTES = 2**24
LATENTS_TOLD = 5


def run_patching(config: Config, progress: Progress = silent) -> dict[str, Any]:
    """Patch base and misaligned model with each other's states at every site; write `config.output`/patching.json.

    Returns what it holds; see `summarise`. Contrasts are sampled from the misaligned model; each site's effect on the
    difference of their log-probabilities is measured, and estimated by attribution; replies are generated under every
    site and judged. What is finished is kept in `config.output`/patching, every judged reply on a line of its own, so
    that a kill costs the batch in hand; a finished sweep is not repeated.

    Raises ConfigError before any work, one line that names the setting; and for an adapter whose replies are never of
    both kinds.
    """
    import yaml

    files = input_files(config)
    run = config.output
    check_place(run, NEEDED_BYTES)
    entry = {
        "config": config.identity("sae_format", "quantization", "patch", "generation", "judge"),
        "inputs": {name: hash_files(path) for name, path in files.items()},
    }
    if "patch" in check_claim(run, "patch", entry) and (run / FILE).is_file():
        return json.loads((run / FILE).read_text(encoding="utf-8"))
    inputs = open_patch_inputs(config)
    held = _held(inputs, progress)
    entry["versions"] = versions()
    with claim(run, "patch", entry), adapter(inputs.model, misaligned_adapter(config)) as adapted:
        if not (run / "config.yaml").exists():  # else it is that of a sweep
            write_text(run / "config.yaml", yaml.safe_dump(config.resolved(), sort_keys=False, allow_unicode=True))
        sweep = _Sweep(inputs, adapted.eval(), held, progress)
        found = sweep.logits()
        log = sweep.replies()
        result = summarise(inputs.sites, found, log, len(inputs.prompts), config.patch.replies)
        write_json(run / FILE, result)
    return json.loads((run / FILE).read_text(encoding="utf-8"))


class _Sweep:
    """The stages of a sweep over one PEFT model."""

    def __init__(self, inputs: PatchInputs, adapted: Any, held: Callable[[Clean], Source], progress: Progress):
        self.inputs, self.config, self.held, self.progress = inputs, inputs.config, held, progress
        self.runner, self.sides = Runner(adapted), Sides(adapted)
        self.folder = inputs.config.output / FOLDER

    def contrasts(self) -> list[Contrast]:
        """A misaligned and an aligned reply of the misaligned model, to each prompt that gets both."""
        settings, generation = self.config.patch, self.config.generation

        def sampled() -> list[Sequence[Any]]:
            self.progress("sample contrasts", 0, 1)
            records = [record for record in self.inputs.records for _ in range(settings.samples)]
            replies = generate(
                self.runner.model, self.inputs.tokenizer, [question(record) for record in records],
                max_new_tokens=generation.max_new_tokens, batch_size=generation.batch_size, temperature=1.0,
                seed=settings.seed,
            )  # fmt: skip
            found = pick_contrasts(replies, rate(self.inputs.judge, records, replies), settings.samples)
            self.progress("sample contrasts", 1, 1)
            return found

        found = kept(self.folder / "contrasts.json", sampled)
        if not found:
            raise ConfigError(
                f"patch.misaligned: in {settings.samples} samples a core prompt, this adapter never gives both a "
                "misaligned and an aligned reply, so there is nothing to tell apart"
            )
        ids = partial(self.inputs.tokenizer, add_special_tokens=False)
        return [Contrast(self.inputs.prompts[n], *(ids(text)["input_ids"] for text in both)) for n, *both in found]

    def logits(self) -> dict[str, Any]:
        """{"clean", "patched", "attribution"}: logit differences in nats; "latents": what the sides differ in."""
        contrasts = self.contrasts()

        def measured() -> dict[str, Any]:
            settings, sites = self.config.patch, self.inputs.sites
            estimates = torch.full((len(sites), len(contrasts)), torch.nan)
            seen: LatentDifferences | None = None
            if self.inputs.latents:
                seen = LatentDifferences(self.inputs.latents[1], self.inputs.layers, settings.positions)

            def look(now: Pass, numbers: list[int]) -> None:
                if seen:
                    seen.add(now)
                for direction in settings.directions if settings.attribution else ():
                    some = [i for i, site in enumerate(sites) if site.direction == direction]
                    found = attributions(self.runner, self.sides, now, direction, [sites[i] for i in some])
                    estimates[torch.tensor(some)[:, None], torch.tensor(numbers)] = found

            found = differences(
                self.runner, self.sides, contrasts, sites, batch_size=self.config.generation.batch_size,
                held=self.held, seen=look, step_done=partial(self.progress, "logit differences"),
            )  # fmt: skip
            return {
                "clean": {side: values.tolist() for side, values in found.clean.items()},
                "patched": found.patched.tolist(),
                "attribution": estimates.tolist() if settings.attribution else None,
                "latents": seen and seen.rows(self.inputs.latents[0].indices.tolist(), LATENTS_TOLD),
            }

        self.progress("logit differences", 0, len(self.inputs.sites) * len(contrasts))
        return kept(self.folder / "differences.json", measured)

    def replies(self) -> PatchLog:
        """Generate and judge what the log does not hold; write and flush it batch after batch."""
        settings, generation, inputs = self.config.patch, self.config.generation, self.inputs
        log = PatchLog(self.folder / "replies.jsonl")
        cells = _cells(inputs)
        missing = [cell for cell in cells if PatchLog.key(cell) not in log.ratings]
        self.progress("patched replies", len(cells) - len(missing), len(cells))
        if not missing:
            return log
        config = decoding(self.runner.model, inputs.tokenizer, generation.max_new_tokens, 0.0)
        limits = Limits(ends_of(config), generation.max_new_tokens, generation.batch_size, generation.temperature)
        waiting: list[tuple[Cell, str]] = []

        def keep() -> None:
            ratings = rate(inputs.judge, [inputs.records[cell.prompt] for cell, _ in waiting], [t for _, t in waiting])
            log.keep([(cell, text, rating) for (cell, text), rating in zip(waiting, ratings, strict=True)])
            waiting.clear()
            self.progress("patched replies", len(cells) - len(missing) + log.added, len(cells))

        said = patched_replies(
            self.runner, self.sides, inputs.prompts, missing, limits, seed=settings.seed, held=self.held
        )
        for cell, tokens in said:
            waiting.append((cell, inputs.tokenizer.decode(tokens, skip_special_tokens=True).strip()))
            if len(waiting) >= generation.batch_size:
                keep()
        if waiting:
            keep()
        return log


def _cells(inputs: PatchInputs) -> list[Cell]:
    """The replies that are wanted: of both sides as they are, and of every site that has a token to patch."""
    settings = inputs.config.patch
    chosen: list[Any] = ["base", "misaligned"] if settings.replies else []
    chosen += [site for site in inputs.sites if site.component in settings.generated] if settings.replies else []
    samples = range(settings.replies if inputs.config.generation.temperature else min(settings.replies, 1))
    return [
        Cell(site, number, sample)
        for site in chosen
        for number, prompt in enumerate(inputs.prompts)
        if not isinstance(site, Site) or site.placed(0, prompt, len(prompt.ids))
        for sample in samples
    ]


def _held(inputs: PatchInputs, progress: Progress) -> Callable[[Clean], Source]:
    """What makes a source of a clean run, as patch.source says. Writes what is missing of the cache."""
    settings = inputs.config.patch
    if settings.source != "cache":
        return {"live": Dense, "nf4": FourBit}[settings.source]
    rows = [{"input_ids": torch.tensor(prompt.ids)} for prompt in inputs.prompts]
    blocksize, outliers = cut(hidden_size(inputs.model))
    caches = {}
    for layer in inputs.layers:
        folder = settings.cache / f"layer-{layer:02}"
        with naming("patch.cache"):
            source = CacheSource(inputs.model, layer, rows, tokens="all")
            write_hidden_states(
                folder, source, outliers=outliers, blocksize=blocksize,
                progress=lambda _, done, total, layer=layer: progress(f"cache layer {layer}", done, total),
            )  # fmt: skip
            caches[layer] = open_cache(folder)
    return partial(Cached, caches=caches)
