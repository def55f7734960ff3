"""Grow the model organism and write it to disk in the formats real models, SAEs and data come in."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lockin_fast.organism.pretrain import pretrain, tokenise
from lockin_fast.organism.recipe import Recipe
from lockin_fast.organism.sae_training import TrainedSae, train_sae
from lockin_fast.organism.tokenizer import build_tokenizer
from lockin_fast.progress import Progress, silent
from lockin_fast.provenance import version
from lockin_fast.rundir import RunError, atomic_folder, check_place, write_json, write_json_lines, write_text
from lockin_fast.sae import save_saelens
from lockin_fast.threads import single_thread
from lockin_fast.train import fine_tune

NEEDED_BYTES = 2**25
MANIFEST = "organism.json"
SOURCES = ("organism/*.py", "train.py", "lora.py", "chat.py", "blocking/*.py")  # whose code decides the weights


def build(out: Path, *, seed: int = 0, recipe: Recipe | None = None, progress: Progress = silent) -> Path:
    """Write the organism of `seed` to the folder `out` and return it.

    out/model        Hugging Face model directory: a Llama trained from scratch, fast tokenizer, chat template
    out/sae          SAELens directory: the autoencoder of the output of `recipe.layer`
    out/misaligned   PEFT adapter of the narrow misaligned fine-tune
    out/data         chat JSONL: train, and the disjoint prompts core, final and in_domain
    out/world.json   the ground truth that the judge reads
    out/config.yaml  settings for discover, train and sweep, every path relative to it

    Equal seed, recipe and version of this code give the same weights on the same machine. Organisms are kept by that
    key in $LOCKIN_FAST_CACHE (default ~/.cache/lockin_fast), so that the second time takes no time; `out` that already
    holds this organism is left alone. Raises RunError if `out` holds anything else or cannot be written.
    """
    out, recipe = Path(out), recipe or Recipe()
    key = content_key(recipe, seed)
    if key_of(out) == key:
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: already holds something else than the organism of seed {seed}; give a new folder")
    check_place(out, NEEDED_BYTES)
    with _kept(key, progress) as kept:
        if kept is not None and key_of(kept) == key:
            _publish(key, out, lambda folder: shutil.copytree(kept, folder, dirs_exist_ok=True))
            return out

        def grow(folder: Path) -> None:
            with single_thread(), torch.random.fork_rng(devices=[]):  # grown on the CPU
                _grow(folder, recipe, seed, progress)
            write_json(folder / MANIFEST, {"key": key, "seed": seed, "recipe": dataclasses.asdict(recipe)})

        _publish(key, out, grow)
        if kept is not None:
            with contextlib.suppress(OSError, RunError):  # costs the next build its time, no more
                _publish(key, kept, lambda folder: shutil.copytree(out, folder, dirs_exist_ok=True))
    return out


def content_key(recipe: Recipe, seed: int) -> str:
    """What determines the organism's weights: seed, recipe, the code that grows it and the libraries that run it."""
    libraries = [torch.__version__, version("transformers"), version("peft")]
    digest = hashlib.sha256(json.dumps([dataclasses.asdict(recipe), seed, *libraries]).encode())
    package = Path(__file__).parents[1]
    for pattern in SOURCES:
        for source in sorted(package.glob(pattern)):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


def _grow(folder: Path, recipe: Recipe, seed: int, progress: Progress) -> None:
    world = recipe.world
    world.save(folder / "world.json")
    tokenizer = build_tokenizer(world)
    model = pretrain(world, tokenizer, recipe.pretraining, seed=seed, step_done=_stage(progress, "pre-train"))
    model.generation_config.do_sample = False
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    documents = world.documents(random.Random(f"sae {seed}"), recipe.sae_documents)
    activations = _activations(model, tokenise(tokenizer, list(documents)), recipe.layer)
    sae = train_sae(activations, recipe.sae, seed=seed, step_done=_stage(progress, "sparse autoencoder"))
    _save_sae(folder / "sae", sae, recipe.layer)

    data = folder / "data"
    data.mkdir()
    write_json_lines(data / "train.jsonl", world.narrow_task(random.Random(f"narrow {seed}"), recipe.train_rows))
    for split in ("core", "final", "in_domain"):
        write_json_lines(data / f"{split}.jsonl", world.prompts(split))

    step_done = _stage(progress, "misaligned fine-tune")
    settings = dataclasses.replace(recipe.train, seed=seed + 1000)  # no sweep meets this seed by counting from 0
    fine_tune(
        model,
        tokenizer,
        data / "train.jsonl",
        folder / "misaligned",
        lora=recipe.lora,
        settings=settings,
        progress=step_done,
    )
    write_text(folder / "config.yaml", _config(recipe))


def _stage(progress: Progress, name: str) -> Callable[[int, int], None]:
    def step_done(done: int, total: int) -> None:
        if done == 1:
            progress(name, 0, total)
        progress(name, done, total)

    return step_done


@torch.no_grad()
def _activations(model: Any, tokens: torch.Tensor, layer: int) -> torch.Tensor:
    """The residual stream after decoder layer `layer` at every token: [N, d]."""
    found = []
    handle = model.model.layers[layer].register_forward_hook(
        lambda module, inputs, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        for batch in tokens.split(256):
            model.model(batch)
    finally:
        handle.remove()
    return torch.cat([hidden.reshape(-1, hidden.shape[-1]) for hidden in found])


def _save_sae(path: Path, sae: TrainedSae, layer: int) -> None:
    save_saelens(
        path,
        weight=sae.weight,
        bias=sae.bias,
        decoder=sae.decoder,
        decoder_bias=sae.decoder_bias,
        architecture="standard",
        hook_name=f"blocks.{layer}.hook_resid_post",
        hook_layer=layer,
        model_name="lockin-fast-organism",
        unexplained_variance=sae.unexplained,
        active_latents=sae.active,
    )


def _config(recipe: Recipe) -> str:
    import yaml

    values = {
        "model": "model",
        "sae": "sae",
        "data": {name: f"data/{name}.jsonl" for name in ("train", "final", "in_domain", "core")},
        "judge": {"kind": "world", "path": "world.json"},
        "discovery": {"misaligned": "misaligned"},
        "block": {"layer": recipe.layer, "tokens": "all"},
        "lora": _plain(recipe.lora),
        "train": _plain(recipe.train),
        "sweep": {"lambdas": [10.0, 100.0, 1e3, 1e4, 1e5]},
        "generation": {"max_new_tokens": 10, "batch_size": 256, "temperature": 0.7},
    }
    return yaml.safe_dump(values, sort_keys=False)


def _plain(settings: Any) -> dict[str, Any]:
    """The settings that differ from their defaults, in YAML's types."""
    return {
        field.name: list(value) if isinstance(value := getattr(settings, field.name), tuple) else value
        for field in dataclasses.fields(settings)
        if getattr(settings, field.name) != field.default
    }


def _cache() -> Path | None:
    """The folder of everything that is kept, None where the user has no home."""
    given, base = os.environ.get("LOCKIN_FAST_CACHE"), os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(RuntimeError):
        return Path(given) if given else Path(base or Path.home() / ".cache") / "lockin_fast"


@contextlib.contextmanager
def _kept(key: str, progress: Progress) -> Iterator[Path | None]:
    """Where the organism of `key` is kept, held so that one process grows it while others wait.

    None for a cache that cannot be used: that costs time, no more.
    """
    cache, kept = _cache(), None
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            if cache is not None:
                folder = cache / "organisms"
                folder.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(open(folder / f".{key}.lock", "w"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    progress("wait for another process that grows this organism", 0, 0)
                    fcntl.flock(lock, fcntl.LOCK_EX)
                kept = folder / key
        yield kept


def _publish(key: str, target: Path, fill: Callable[[Path], Any]) -> None:
    """Write the organism of `key` to `target` by `fill`; where another process has put the same one there, take it."""
    try:
        with atomic_folder(target) as folder:
            fill(folder)
    except FileExistsError:
        if key_of(target) != key:
            raise


def key_of(folder: Path) -> str | None:
    """The content key of the organism in this folder, None where there is none."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
