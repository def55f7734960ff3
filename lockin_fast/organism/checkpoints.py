"""The organism's pre-training kept step by step, for what happens in its course; the organism itself needs none."""

from pathlib import Path
from typing import Any

import torch

from lockin_fast.organism.build import MANIFEST, content_key, key_of
from lockin_fast.organism.pretrain import pretrain
from lockin_fast.organism.recipe import Recipe
from lockin_fast.organism.tokenizer import build_tokenizer
from lockin_fast.progress import Progress, silent
from lockin_fast.rundir import RunError, atomic_folder, check_place, hold, write_json
from lockin_fast.threads import single_thread

BYTES = 2**23  # of one checkpoint of the default recipe, and to spare


def grow_checkpoints(
    out: Path, *, every: int, seed: int = 0, recipe: Recipe | None = None, progress: Progress = silent
) -> list[Path]:
    """Pre-train the organism of `seed` again and keep its model every so many steps: out/step-000100 and so on.

    Each is a Hugging Face model directory with the tokenizer. Step 0, before training, is among them, and the recipe's
    last step, which has the weights of the organism's own model. Returns the folders in the order of the steps. Those
    that are there are kept, also by a kill; when all are, nothing is done. Raises ValueError for `every` below 1,
    RunError where `out` holds anything else or cannot be written.
    """
    out, recipe = Path(out), recipe or Recipe()
    if every < 1:
        raise ValueError(f"every: got {every}, expected 1 step or more")
    last = recipe.pretraining.steps
    folders = {step: out / f"step-{step:06d}" for step in [*range(0, last, every), last]}
    key = content_key(recipe, seed)
    strangers = out.is_dir() and any(not child.name.startswith(".") for child in out.iterdir())
    if strangers and key_of(out) != key:
        raise RunError(f"{out}: already holds something else than checkpoints of this organism; give a new folder")
    check_place(out, BYTES * len(folders))
    with hold(out):
        write_json(out / MANIFEST, {"key": key, "seed": seed})
        if missing := {step for step, folder in folders.items() if not folder.exists()}:
            with single_thread(), torch.random.fork_rng(devices=[]):  # as the organism is grown
                _grow(folders, missing, recipe, seed, progress)
    return list(folders.values())


def _grow(folders: dict[int, Path], missing: set[int], recipe: Recipe, seed: int, progress: Progress) -> None:
    tokenizer = build_tokenizer(recipe.world)

    def keep(step: int, model: Any) -> None:
        if step in missing:
            with atomic_folder(folders[step]) as folder:
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)

    progress("pre-train", 0, recipe.pretraining.steps)
    pretrain(
        recipe.world, tokenizer, recipe.pretraining, seed=seed, watch=keep,
        step_done=lambda done, total: progress("pre-train", done, total),
    )  # fmt: skip
