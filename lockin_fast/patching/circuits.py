"""The heads of a model and its checkpoints: scores, what induction heads recover, and when induction begins."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lockin_fast.config import Config, ConfigError, naming
from lockin_fast.inputs import check_files, open_model, open_tokenizer
from lockin_fast.patching.copying import copying_scores
from lockin_fast.patching.forward import Runner
from lockin_fast.patching.induction import check_attention, flagged, over_seeds, prefix_scores, repeated_tokens
from lockin_fast.patching.recovery import Effect, patching_effect, random_sets, second_copy_score
from lockin_fast.progress import Progress, silent
from lockin_fast.rundir import check_claim, check_place, claim, hash_files, write_json

FILE = "circuits.json"
NEEDED_BYTES = 2**24
GROWS = ("checkpoints.*",)
SURE, LEAST = 2, 1e-3  # standard errors, and nats, by which the copy has to help for a share of that to mean anything
LOW, HIGH = 0.05, 0.95  # of the draws of random heads


class Sequences(NamedTuple):
    """The random tokens of one seed, [N, T] each, and where their second copy begins."""

    clean: Tensor
    corrupt: Tensor
    start: int


def run_circuits(config: Config, progress: Progress = silent) -> Path:
    """Score the heads of `config.model`, patch the induction heads, look through the checkpoints; write circuits.json.

    Returns its path in `config.output`. It holds {"layers", "heads", "length", "sequences", "seeds"}, "prefix" and
    "error" (its standard error over seeds), "copying" and "copying_folded" (norms folded in) as [layers][heads];
    "gain", what the repeated copy adds to the log-probability of the second, in nats; "thresholds", for each the heads
    flagged, their "recovery" with its error, and that of as many "random" heads, which are none of those flagged; and
    "onset", a row for each of `circuits.checkpoints`. Recovery is null where no head is flagged or where the gain is
    not sure, random where fewer heads are left.

    What is finished of it is kept in `config.output`/circuits, so that a kill costs the seed or the checkpoint in
    hand; checkpoints may be added later. Holds the run folder while it works. Raises ConfigError before any work.
    """
    config.require("output")
    check_files(config, "model")
    checkpoints = find_checkpoints(config.circuits.checkpoints)
    run = config.output
    check_place(run, NEEDED_BYTES)
    entry = {
        "config": config.identity("quantization", "circuits"),
        "inputs": {"model": hash_files(config.model)}
        | {f"checkpoints.{folder.name}": hash_files(folder) for folder in checkpoints.values()},
    }
    if "circuits" in check_claim(run, "circuits", entry, may_grow=GROWS) and _finished(run / FILE, checkpoints):
        return run / FILE
    tokenizer = open_tokenizer(config)
    sequences = _sequences(config, tokenizer)
    model = open_model(config)
    with naming("model"):
        check_attention(model, sequences[0].clean.shape[1])
        runner = Runner(model)
    with claim(run, "circuits", entry, may_grow=GROWS):
        parts = run / "circuits"
        (parts / "onset").mkdir(parents=True, exist_ok=True)
        found = _scores(config, model, sequences, parts, progress)
        found |= _recovery(config, runner, sequences, _tensor(found["prefix"]), parts, progress)
        del model, runner  # before the checkpoints are loaded
        found["onset"] = _onset(config, checkpoints, sequences, parts / "onset", progress)
        write_json(run / FILE, found)
    return run / FILE


def find_checkpoints(folder: Path | None) -> dict[int, Path]:
    """{step: model folder} in the order of the steps, for the folders in `folder` whose names end in a number.

    Raises ConfigError where there are none, two of one step, or one that holds no model.
    """
    if folder is None:
        return {}
    if not folder.is_dir():
        raise ConfigError(f"circuits.checkpoints: no such folder: {folder}")
    found: dict[int, Path] = {}
    for child in sorted(folder.iterdir()):
        number = re.search(r"(\d+)$", child.name)
        if number and child.is_dir() and not child.name.startswith("."):
            if int(number[1]) in found:
                raise ConfigError(f"circuits.checkpoints: {found[int(number[1])].name} and {child.name} are one step")
            if not (child / "config.json").is_file():
                raise ConfigError(f"circuits.checkpoints: {child} holds no config.json; expected a model folder")
            found[int(number[1])] = child
    if not found:
        raise ConfigError(f"circuits.checkpoints: {folder} holds no folder whose name ends in a step, as step-000100")
    return dict(sorted(found.items()))


def _finished(file: Path, checkpoints: Mapping[int, Path]) -> bool:
    return file.is_file() and {row["step"] for row in json.loads(file.read_text())["onset"]} == set(checkpoints)


def _sequences(config: Config, tokenizer: Any) -> list[Sequences]:
    """Random tokens of every seed, without the tokenizer's special ones."""
    settings, special = config.circuits, set(tokenizer.all_special_ids)
    pool = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    first = tokenizer.bos_token_id
    found = []
    for seed in settings.seeds:
        with naming("circuits.length"):
            pair = repeated_tokens(pool, settings.length, settings.sequences, seed=seed, start=first)
        found.append(Sequences(*pair, settings.length + (first is not None)))
    return found


def _scores(config: Config, model: Any, sequences: Sequence[Sequences], parts: Path, progress: Progress) -> dict:
    settings = config.circuits
    progress("head scores", 0, len(sequences) + 2)
    of_seeds = []
    for done, (seed, drawn) in enumerate(zip(settings.seeds, sequences, strict=True), 1):
        of_seeds.append(_kept(parts / f"prefix-{seed}.json", lambda drawn=drawn: _prefix(config, model, drawn)))
        progress("head scores", done, len(sequences) + 2)
    copying = {}
    for fold in (False, True):
        kept = _kept(parts / f"copying{'-folded' * fold}.json", lambda fold=fold: _copying(model, fold))
        copying |= {f"copying{'_folded' * fold}": kept["scores"], f"copying{'_folded' * fold}_refused": kept["refused"]}
        progress("head scores", len(sequences) + 1 + fold, len(sequences) + 2)
    mean, error = over_seeds(_tensor(of_seeds))
    sizes = {name: getattr(settings, name) for name in ("length", "sequences", "seeds")}
    layers, heads = mean.shape
    return {"layers": layers, "heads": heads, **sizes, "prefix": mean.tolist(), "error": error.tolist(), **copying}


def _prefix(config: Config, model: Any, drawn: Sequences) -> list:
    return prefix_scores(model, drawn.clean, batch_size=config.circuits.batch_size).double().mean(0).tolist()


def _copying(model: Any, fold: bool) -> dict[str, Any]:
    """The scores, or why this model has none: the rest can be had without them."""
    try:
        return {"scores": copying_scores(model, fold_norms=fold).tolist(), "refused": None}
    except ValueError as error:
        return {"scores": None, "refused": str(error)}


def _recovery(
    config: Config, runner: Runner, sequences: Sequence[Sequences], prefix: Tensor, parts: Path, progress: Progress
) -> dict[str, Any]:
    """What the flagged heads of every threshold recover, and random heads beside them."""
    settings = config.circuits
    flags = flagged(prefix, settings.thresholds)
    sets = _Sets(flags, settings.draws)
    progress("recovery", 0, len(sequences))
    effects = []
    for done, (seed, drawn) in enumerate(zip(settings.seeds, sequences, strict=True), 1):

        def effect(drawn=drawn) -> list:
            found = patching_effect(runner, *drawn[:2], sets.chosen, start=drawn.start, batch_size=settings.batch_size)
            return [part.tolist() for part in found]

        kept = _kept(parts / f"recovery-{seed}.json", effect)
        clean, corrupt, patched = (torch.tensor(part, dtype=torch.float64) for part in kept)
        effects.append(Effect(clean, corrupt, patched.view(len(sets.chosen), len(clean))))  # also of no set at all
        progress("recovery", done, len(sequences))
    whole = Effect(*(torch.cat(part, -1) for part in zip(*effects, strict=True)))
    gain = whole.clean - whole.corrupt
    error = gain.std() / len(gain) ** 0.5 if len(gain) > 1 else torch.tensor(torch.nan)
    sure = bool(gain.mean() > SURE * error and gain.mean() > LEAST)
    recovery = whole.recovery()
    rows = []
    for threshold, flag in zip(settings.thresholds, flags, strict=True):
        row = {"threshold": threshold, "heads": flag.nonzero().tolist(), "recovery": None, "error": None}
        if sure and flag.any():
            index, drawn = sets.of(flag)
            of_seeds = over_seeds(torch.stack([effect.recovery()[index] for effect in effects]))
            row |= {"recovery": recovery[index].item(), "error": of_seeds.error.item()}
            if len(drawn):
                low, high = recovery[drawn].quantile(torch.tensor([LOW, HIGH], dtype=torch.float64)).tolist()
                row["random"] = {"mean": recovery[drawn].mean().item(), "low": low, "high": high, "draws": len(drawn)}
        rows.append({"random": None, **row})
    return {"gain": gain.mean().item(), "gain_error": error.item(), "thresholds": rows}


class _Sets:
    """The different sets of flagged heads and the random ones of their sizes, all in one list to patch."""

    def __init__(self, flags: Sequence[Tensor], draws: int):
        self._draws, self._place = draws, {}
        listed: list[Tensor] = [flags[0][None][:0]]
        count = 0
        for flag in flags:
            key = tuple(flag.flatten().tolist())
            if flag.any() and key not in self._place:
                size, free = int(flag.sum()), int((~flag).sum())
                drawn = random_sets(size, draws, exclude=flag, seed=size) if size <= free else flag[None][:0]
                self._place[key] = count, range(count + 1, count + 1 + len(drawn))
                listed += [flag[None], drawn]
                count += 1 + len(drawn)
        self.chosen = torch.cat(listed)  # bool [sets, layers, H]

    def of(self, flag: Tensor) -> tuple[int, list[int]]:
        """Where this set of flagged heads is in `chosen`, and the random sets of its size, if any."""
        index, drawn = self._place[tuple(flag.flatten().tolist())]
        return index, list(drawn)


def _onset(
    config: Config, checkpoints: Mapping[int, Path], sequences: Sequence[Sequences], parts: Path, progress: Progress
) -> list[dict[str, Any]]:
    """A row a checkpoint: its step, the scores of its heads, and what a repeated copy adds to the log-probability."""
    rows = []
    for done, (step, folder) in enumerate(checkpoints.items()):
        progress("checkpoints", done, len(checkpoints))

        def measure(folder=folder) -> dict[str, Any]:
            model = open_model(dataclasses.replace(config, model=folder))
            mean, error = over_seeds(_tensor([_prefix(config, model, drawn) for drawn in sequences]))
            clean, corrupt = (
                torch.cat([second_copy_score(model, drawn[which], start=drawn.start) for drawn in sequences])
                for which in (0, 1)
            )
            return {"prefix": mean.tolist(), "error": error.tolist(), "gain": (clean - corrupt).mean().item()}

        rows.append({"step": step, **_kept(parts / f"{folder.name}.json", measure)})
    if checkpoints:
        progress("checkpoints", len(checkpoints), len(checkpoints))
    return rows


def _kept(file: Path, make: Callable[[], Any]) -> Any:
    """What is in the file, made and written first where it is not there."""
    if not file.exists():
        write_json(file, make())
    return json.loads(file.read_text(encoding="utf-8"))


def _tensor(rows: Any) -> Tensor:
    """Nested lists in float64, null as NaN."""

    def numbers(value: Any) -> Any:
        return [numbers(child) for child in value] if isinstance(value, list) else torch.nan if value is None else value

    return torch.tensor(numbers(rows), dtype=torch.float64)
