"""The causal set: found in rounds, each on a model that was trained with all found before it blocked."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lockin_fast.blocking import BlockPenalty
from lockin_fast.discovery.contrasts import pick_contrasts
from lockin_fast.discovery.job import Job, largest, signs
from lockin_fast.discovery.joint import joint_repair
from lockin_fast.discovery.reply_scores import Contrast
from lockin_fast.exam import question
from lockin_fast.judges import rate
from lockin_fast.lora import adapter
from lockin_fast.train import fine_tune


@dataclass(frozen=True)
class Found:
    """A causal latent: its mean shift in the model it was found on, and its gain in joint repair there, in nats."""

    latent: int
    shift: float
    gain: float


def find_causal(
    job: Job, told: Sequence[Sequence[dict[str, str]]], repairs: set[int], screened: Sequence[int]
) -> list[Found]:
    """The causal set, best first within each round; on the conversations `told` shifts are measured.

    Every round looks at the latents that the model of that round shifts most and builds its part by `joint_repair`;
    the first keeps to `repairs`, the latents of the pool `screened` whose steering repaired the misaligned model. After
    a round the model is fine-tuned anew with all found so far blocked: what misalignment comes back shows the latents
    that were missing, as in the paper's re-discovery on a re-emerged model. A round that finds no misalignment left
    ends the search, and what is missing to `discovery.latents` is found on the misaligned model.
    """
    settings, model = job.config.discovery, job.inputs.model
    found: list[Found] = []
    for number in range(1, settings.rounds + 1):
        name = _stage(job, number)
        count = (settings.latents - len(found)) // (settings.rounds - number + 1)
        source = settings.misaligned if number == 1 else _blocked_fine_tune(job, found, number - 1)
        with adapter(model, source) as adapted:
            contrasts = find_contrasts(job, adapted, number)
            if contrasts:
                shift = job.shift(adapted, told, number, name)
                pool = _pool(job, shift, found, screened if number == 1 else ())
                pool = _repairing(pool, repairs, count) if number == 1 else pool
                found += _joint_repair(job, adapted, contrasts, shift, pool, count, number)
        if not contrasts:
            with adapter(model, settings.misaligned) as adapted:
                shift, count = job.shift(adapted, told, 1, name), settings.latents - len(found)
                pool = _repairing(_pool(job, shift, found, screened), repairs, count)
                found += _joint_repair(job, adapted, find_contrasts(job, adapted, 1), shift, pool, count, number)
            break
    return found


def _stage(job: Job, number: int) -> str:
    return f"joint repair, round {number} of {job.config.discovery.rounds}"


def find_contrasts(job: Job, adapted: Any, number: int) -> list[Contrast]:
    """(prompt, misaligned reply, aligned reply), both sampled from the model of round `number`.

    Its own replies of both kinds share the style that fine-tuning gave it, so that what tells them apart is alignment.
    """

    def sampled() -> list[Contrast]:
        samples = job.config.discovery.samples
        records = [job.records[i] for i in job.prompts for _ in range(samples)]
        replies = job.answers(adapted, [question(record) for record in records], 1.0)
        found = pick_contrasts(replies, rate(job.judge, records, replies), samples)
        return [(question(records[number * samples]), *both) for number, *both in found]

    return job.kept(f"contrasts-{number}", sampled)


def _pool(job: Job, shift: Tensor, found: Sequence[Found], screened: Sequence[int] = ()) -> list[int]:
    """The latents `screened`, then those that the model of a round shifts most, without those found before."""
    known = {f.latent for f in found}
    shifted = largest(shift, job.config.discovery.pool + len(known))
    return [k for k in dict.fromkeys([*screened, *shifted]) if k not in known]


def _repairing(pool: Sequence[int], repairs: set[int], count: int) -> list[int]:
    """Those of the pool that repair; where they are fewer than `count`, others fill up."""
    others = [k for k in pool if k not in repairs]
    pool = [k for k in pool if k in repairs]
    return pool + others[: max(0, count - len(pool))]


def _joint_repair(
    job: Job, adapted: Any, contrasts: Sequence[Contrast], shift: Tensor, pool: list[int], count: int, number: int
) -> list[Found]:
    """`count` latents of the pool for round `number`, by what is known of the model `adapted`."""

    def chosen() -> list[dict[str, Any]]:
        rows = joint_repair(
            adapted,
            job.inputs.tokenizer,
            contrasts,
            job.sae.rows(pool),
            signs(shift)[pool],
            layer=job.config.block.layer,
            count=count,
            batch_size=job.config.generation.batch_size,
            step_done=job.stage(_stage(job, number)),
        )
        return [dataclasses.asdict(Found(pool[row], shift[pool[row]].item(), gain)) for row, gain in rows]

    return [Found(**row) for row in job.kept(f"causal-{number}", chosen)]


def _blocked_fine_tune(job: Job, found: Sequence[Found], number: int) -> Path:
    """The adapter of a fine-tune with all of `found` blocked, after round `number`; once it is there, it stays."""
    config, folder = job.config, job.folder / f"blocked-{number}"
    if folder.exists():
        return folder
    latents = job.latent_set("causal", {f.latent: f.shift for f in found}, None)
    penalty = BlockPenalty(
        job.sae.rows(latents.indices),
        latents,
        config.block.layer,
        config.discovery.weight,
        tokens=config.block.tokens,
        latent_reduction=config.block.latent_reduction,
    )
    return fine_tune(
        job.inputs.model,
        job.inputs.tokenizer,
        job.inputs.dataset,
        folder,
        lora=config.lora,
        settings=dataclasses.replace(config.train, seed=config.discovery.seed + 2000 + number),
        penalty=penalty,
        progress=job.stage(f"fine-tune with {len(found)} latents blocked"),
    ).adapter_path
