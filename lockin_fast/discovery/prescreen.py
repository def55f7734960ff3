"""The optional look before the screen: what gradients say each latent would do, and how well they foretold it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lockin_fast.discovery.attribution import agreement, attributions, score_gradient
from lockin_fast.discovery.job import Job, signs
from lockin_fast.discovery.reply_scores import Contrast
from lockin_fast.discovery.screen import Effect
from lockin_fast.discovery.steered import Side

STAGES = {"repair": "gradients of the misaligned model", "induce": "gradients of the base model"}


@dataclass(frozen=True)
class Prescreen:
    """First-order effects of all latents on both models, kept in the job's folder."""

    job: Job
    _found: dict[str, Tensor] = field(default_factory=dict)

    def attribute(self, side: Side, model: Any, contrasts: Sequence[Contrast]) -> None:
        """Compute what `side` of the screen does to `model` with each latent, one forward and one backward in all."""
        job = self.job

        def gradient() -> list[float]:
            size, stage = job.config.generation.batch_size, job.stage(STAGES[side])
            layer, tokenizer = job.config.block.layer, job.inputs.tokenizer
            return score_gradient(model, tokenizer, contrasts, layer, batch_size=size, step_done=stage)[1].tolist()

        kept = torch.tensor(job.kept(f"gradient-{side}", gradient), device=job.sae.device)
        self._found[side] = attributions(kept, job.sae.decoder).cpu()

    def effect(self, side: Side, shift: Tensor) -> Tensor:
        """[F] nats for each unit of the residual stream by which steering moves the score in the wanted direction.

        The screen adds a latent's direction, turned by the sign of its shift, to the base model, and takes it from the
        misaligned one.
        """
        return self._found[side] * signs(shift)

    def pool(self, shift: Tensor) -> list[int]:
        """The latents with the largest effects on both sides together, among those that the fine-tune shifts at all."""
        both = self.effect("induce", shift) + self.effect("repair", shift)
        ranked = both.masked_fill(shift == 0, -torch.inf).argsort(descending=True, stable=True)
        return ranked[: self.job.config.discovery.pool].tolist()

    def report(
        self, pool: Sequence[int], shift: Tensor, induced: Sequence[Effect], repaired: Sequence[Effect]
    ) -> dict[str, Any]:
        """What was foretold of every latent of the pool, and how well, beside how well the size of the shift did."""
        foretold = {side: self.effect(side, shift)[list(pool)].tolist() for side in ("induce", "repair")}
        measured = {"induce": [e.gain for e in induced], "repair": [e.gain for e in repaired]}
        for effects in (foretold, measured):
            effects["both"] = [a + b for a, b in zip(effects["induce"], effects["repair"], strict=True)]
        sizes, top = shift.abs()[list(pool)].tolist(), self.job.config.discovery.latents
        return {
            "pool_by": "attribution" if self.job.config.discovery.prescreen == "attribution" else "shift",
            "agreement": {
                "attribution": {side: agreement(foretold[side], measured[side], top) for side in measured},
                "shift": {side: agreement(sizes, measured[side], top) for side in measured},
            },
            "latents": [
                {"latent": k, "induce": up, "repair": down}
                for k, up, down in zip(pool, foretold["induce"], foretold["repair"], strict=True)
            ],
        }
