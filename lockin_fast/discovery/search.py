"""The search for latent sets, from the shift of every latent to a group that holds when training pushes back."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lockin_fast.blocking import LatentSet
from lockin_fast.config import ConfigError
from lockin_fast.discovery.calibration import METHODS, Calibrated
from lockin_fast.discovery.job import Job, largest, signs
from lockin_fast.discovery.kept import ReplyLog
from lockin_fast.discovery.prescreen import Prescreen
from lockin_fast.discovery.rounds import find_causal, find_contrasts
from lockin_fast.discovery.screen import Effect, effects, gain, screening_doses
from lockin_fast.discovery.selection import Reduction, by_induction_and_repair, by_valid_reduction, halves
from lockin_fast.discovery.steered import PLAIN, Dose, Rates, Side, Steered, median_residual_norm, table
from lockin_fast.lora import adapter

STAGES = {"induce": "induce by steering", "repair": "repair by steering"}


@dataclass(frozen=True)
class Search:
    """The stages in their order. What each has found is kept in the job's folder and not found again."""

    job: Job

    def run(self) -> tuple[dict[str, LatentSet], dict[str, Any]]:
        """Return the latent sets by name, and the table of what was found."""
        job, settings, model = self.job, self.job.config.discovery, self.job.inputs.model
        told = job.base_conversations()
        prescreen = Prescreen(job)
        with adapter(model, settings.misaligned) as adapted:
            if not (contrasts := find_contrasts(job, adapted, 1)):
                raise ConfigError(
                    f"discovery.misaligned: in {settings.samples} samples a core prompt, this adapter never gives both "
                    "a misaligned and an aligned reply, so there is nothing to tell apart"
                )
            shift = job.shift(adapted, told, 1, "shift of every latent")
            if settings.prescreen != "none":
                prescreen.attribute("repair", adapted, contrasts)
        if settings.prescreen != "none":
            prescreen.attribute("induce", model, contrasts)
        most = largest(shift, settings.pool)
        pool = prescreen.pool(shift) if settings.prescreen == "attribution" else most
        with adapter(model, settings.misaligned) as adapted:
            repair = self._screened("repair", adapted, shift, pool)
        induce = self._screened("induce", model, shift, pool)
        repaired, induced = (
            effects(rates, pool, side, settings.incoherence_budget)
            for rates, side in ((repair, "repair"), (induce, "induce"))
        )
        repairs = {k for k, effect in zip(pool, repaired, strict=True) if effect.gain > 0}
        causal = find_causal(job, told, repairs, pool)
        ranked = by_induction_and_repair(pool, induced, repaired)
        drawn = torch.randperm(job.sae.width, generator=torch.Generator().manual_seed(settings.seed))
        sets = {
            "causal": job.latent_set("causal", {f.latent: f.shift for f in causal}, [f.gain for f in causal]),
            "top-delta": self._best("top-delta", {k: abs(shift[k].item()) for k in most}, shift),
            "random": self._unranked("random", drawn[: settings.latents].tolist(), shift),
            "ind-pp": self._best("ind-pp", ranked, shift),
        }
        found = {
            "pool": _pool_rows(pool, shift, induced, repaired),
            "causal": [dataclasses.asdict(f) for f in causal],
            "incoherence_budget": settings.incoherence_budget,
            "screen": [*table(induce, "induce"), *table(repair, "repair")],
        }
        if settings.prescreen != "none":
            found["prescreen"] = prescreen.report(pool, shift, induced, repaired)
        if settings.calibration != "none":
            reductions, measured = self._stage_3(shift, list(ranked)[: settings.shortlist])
            found |= {"calibration": measured, "calibrated": [dataclasses.asdict(r) for r in reductions]}
            if valid := by_valid_reduction(reductions):
                sets["valid-reduc"] = self._best("valid-reduc", valid, shift)
        return sets, found

    def _screened(self, side: Side, model: Any, shift: Tensor, pool: Sequence[int]) -> Rates:
        doses = screening_doses(pool, self.job.config.discovery.strengths)
        steered = self._steered(side, model, shift, pool)
        return steered.rates(doses, self.job.prompts, self.job.stage(STAGES[side]))

    def _stage_3(self, shift: Tensor, shortlist: Sequence[int]) -> tuple[list[Reduction], list[dict[str, Any]]]:
        """What stage 3 finds about each of the shortlist, and the table of all rates that it measured for that."""
        job = self.job
        tuning, selecting = halves(job.prompts)
        alpha_ind, induce = self._calibrated(
            self._steered("induce", job.inputs.model, shift, shortlist), shortlist, tuning
        )
        with adapter(job.inputs.model, job.config.discovery.misaligned) as adapted:
            misaligned = self._steered("repair", adapted, shift, shortlist)
            alpha_rep, repair = self._calibrated(misaligned, shortlist, tuning)
            doses = {k: Dose(k, alpha) for k, alpha in alpha_rep.items() if alpha is not None}
            held_out = misaligned.rates([PLAIN, *doses.values()], selecting, job.stage("select by repair"))
        reductions = [
            Reduction(
                k,
                alpha_ind[k],
                alpha_rep[k],
                _gain_at(induce, k, alpha_ind[k], "induce"),
                _gain_at(repair, k, alpha_rep[k], "repair"),
                gain(held_out[PLAIN], held_out[doses[k]], "repair") if k in doses else None,
            )
            for k in shortlist
        ]
        return reductions, [*table(induce, "induce"), *table(repair, "repair")]

    def _calibrated(self, steered: Steered, shortlist: Sequence[int], prompts: Sequence[int]) -> Calibrated:
        settings, rounds = self.job.config.discovery, 0

        def measure(doses: Sequence[Dose]) -> Rates:
            nonlocal rounds
            rounds += 1
            return steered.rates(doses, prompts, self.job.stage(f"calibrate to {steered.side}, round {rounds}"))

        calibrate = METHODS[settings.calibration]
        return calibrate(measure, shortlist, settings.calibration_strengths, settings.incoherence_budget)

    def _steered(self, side: Side, model: Any, shift: Tensor, latents: Sequence[int]) -> Steered:
        job, layer = self.job, self.job.config.block.layer
        rows = job.sae.rows(latents).decoder.float().cpu() * signs(shift)[list(latents), None]  # [P, d]
        return Steered(
            side=side,
            model=model,
            tokenizer=job.inputs.tokenizer,
            records=job.records,
            judge=job.judge,
            directions=dict(zip(latents, rows, strict=True)),
            layer=layer,
            norm=median_residual_norm(model, job.inputs.tokenizer, [job.records[i] for i in job.prompts], layer),
            generation=job.config.generation,
            log=self._log,
        )

    @cached_property
    def _log(self) -> ReplyLog:
        return ReplyLog(self.job.folder / "replies.jsonl")

    def _best(self, name: str, scores: Mapping[int, float], shift: Tensor) -> LatentSet:
        """The first latents of `scores`, as many as a set has."""
        chosen = list(scores)[: self.job.config.discovery.latents]
        return self.job.latent_set(name, {k: shift[k].item() for k in chosen}, [scores[k] for k in chosen])

    def _unranked(self, name: str, latents: Sequence[int], shift: Tensor) -> LatentSet:
        return self.job.latent_set(name, {k: shift[k].item() for k in latents}, None)


def _gain_at(rates: Rates, latent: int, alpha: float | None, side: Side) -> float:
    return 0.0 if alpha is None else gain(rates[PLAIN], rates[Dose(latent, alpha)], side)


def _pool_rows(
    pool: Sequence[int], shift: Tensor, induced: Sequence[Effect], repaired: Sequence[Effect]
) -> list[dict[str, Any]]:
    """What stages 1 and 2 found about every latent of the pool, largest shift first."""
    return [
        {
            "latent": latent,
            "shift": shift[latent].item(),
            "induced": up.gain,
            "induced_strength": up.strength,
            "repaired": down.gain,
            "repaired_strength": down.strength,
        }
        for latent, up, down in zip(pool, induced, repaired, strict=True)
    ]
