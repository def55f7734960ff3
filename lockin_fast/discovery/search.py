"""The search for latent sets, from the shift of every latent to a group that holds when training pushes back."""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lockin_fast.blocking import BlockPenalty, LatentSet
from lockin_fast.config import Config, ConfigError
from lockin_fast.discovery.joint import joint_repair
from lockin_fast.discovery.screen import Effect, screen
from lockin_fast.discovery.shift import mean_shift
from lockin_fast.exam import question
from lockin_fast.generation import generate
from lockin_fast.inputs import Inputs
from lockin_fast.judges import Judge
from lockin_fast.lora import adapter
from lockin_fast.progress import Progress
from lockin_fast.rundir import PARTIAL
from lockin_fast.sae import SparseAutoencoder
from lockin_fast.train import fine_tune

Contrast = tuple[list[dict[str, str]], str, str]  # a prompt, a misaligned reply to it, an aligned one


@dataclass(frozen=True)
class Search:
    """What every stage shares: the model with its tokenizer and training data, the SAE, the core prompts, the judge."""

    config: Config
    inputs: Inputs
    sae: SparseAutoencoder
    records: Sequence[Mapping[str, Any]]
    judge: Judge
    progress: Progress

    def run(self) -> tuple[dict[str, LatentSet], dict[str, Any]]:
        """Return the latent sets by name, and the table of what was found."""
        settings, model = self.config.discovery, self.inputs.model
        told = self._base_conversations()
        with adapter(model, settings.misaligned) as adapted:
            contrasts = self._contrasts(adapted)
            if not contrasts:
                raise ConfigError(
                    f"discovery.misaligned: in {settings.samples} samples a core prompt, this adapter never gives both "
                    "a misaligned and an aligned reply, so there is nothing to tell apart"
                )
            shift = self._shift(adapted, told, "shift of every latent")
            pool = _largest(shift, settings.pool)
            repaired = self._screen(adapted, pool, shift, repair=True)
        induced = self._screen(model, pool, shift, repair=False)
        repairs = {latent for latent, effect in zip(pool, repaired, strict=True) if effect.gain > 0}
        causal = self.causal(told, contrasts, repairs)
        largest = {latent: shift[latent].item() for latent in pool[: settings.latents]}
        generator = torch.Generator().manual_seed(settings.seed)
        drawn = torch.randperm(self.sae.width, generator=generator)[: settings.latents].tolist()
        sets = {
            "causal": self._set("causal", {found.latent: found.shift for found in causal}, [f.gain for f in causal]),
            "top-delta": self._set("top-delta", largest, [abs(value) for value in largest.values()]),
            "random": self._set("random", {latent: shift[latent].item() for latent in drawn}, None),
        }
        return sets, _table(pool, shift.tolist(), induced, repaired, causal)

    def causal(self, told: list[list[dict]], first: list[Contrast], repairs: set[int]) -> list["Found"]:
        """The causal set, best first within each round; `first` are the contrasts of the misaligned model.

        Every round looks at the latents that the model of that round shifts most and builds its part by `joint_repair`;
        the first keeps to `repairs`, the latents whose steering repaired the misaligned model. After a round the model
        is fine-tuned anew with all found so far blocked: what misalignment comes back shows the latents that were
        missing, as in the paper's re-discovery on a re-emerged model. A round that finds no misalignment left ends the
        search, and what is missing to `discovery.latents` is found on the misaligned model.
        """
        settings = self.config.discovery
        found: list[Found] = []
        misaligned = settings.misaligned
        with tempfile.TemporaryDirectory(dir=self.config.output, prefix=".rounds", suffix=PARTIAL) as folder:
            for number in range(settings.rounds):
                if number:
                    trained = self._blocked_fine_tune(found, Path(folder) / str(number), number)
                count = (settings.latents - len(found)) // (settings.rounds - number)
                name = f"joint repair, round {number + 1} of {settings.rounds}"
                with adapter(self.inputs.model, trained if number else misaligned) as adapted:
                    contrasts = self._contrasts(adapted) if number else first
                    if contrasts:
                        found += self._part(
                            adapted, told, contrasts, found, repairs if not number else None, count, name
                        )
                if not contrasts:
                    with adapter(self.inputs.model, misaligned) as adapted:
                        missing = settings.latents - len(found)
                        found += self._part(adapted, told, first, found, repairs, missing, name)
                    break
        return found

    def _part(self, adapted, told, contrasts, found, repairs, count, name) -> list["Found"]:
        """`count` more latents by joint repair on `adapted`; where `repairs` has too few, the pool fills up."""
        known = {f.latent for f in found}
        shift = self._shift(adapted, told, name)
        pool = [k for k in _largest(shift, self.config.discovery.pool + len(known)) if k not in known]
        if repairs is not None:
            others = [k for k in pool if k not in repairs]
            pool = [k for k in pool if k in repairs]
            pool += others[: max(0, count - len(pool))]
        chosen = joint_repair(
            adapted,
            self.inputs.tokenizer,
            contrasts,
            self.sae.rows(pool),
            _signs(shift)[pool],
            layer=self.config.block.layer,
            count=count,
            batch_size=self.config.generation.batch_size,
            step_done=self._stage(name),
        )
        return [Found(pool[row], shift[pool[row]].item(), gain) for row, gain in chosen]

    def _base_conversations(self) -> list[list[dict]]:
        """The core prompts with the base model's greedy replies, which every model reads when shifts are measured."""
        prompts = [question(record) for record in self.records]
        replies = self._generate(self.inputs.model, prompts, 0.0)
        return [[*p, {"role": "assistant", "content": text}] for p, text in zip(prompts, replies, strict=True)]

    def _shift(self, adapted, told, name) -> torch.Tensor:
        layer = self.config.block.layer
        return mean_shift(adapted, self.inputs.tokenizer, told, self.sae, layer, step_done=self._stage(name))

    def _screen(self, model, pool, shift, *, repair) -> list[Effect]:
        settings = self.config.discovery
        directions = (self.sae.decoder.float().cpu() * _signs(shift)[:, None])[pool].to(model.device)
        return screen(
            model,
            self.inputs.tokenizer,
            self._some_records(),
            self.judge,
            directions,
            layer=self.config.block.layer,
            repair=repair,
            strengths=settings.strengths,
            incoherence_budget=settings.incoherence_budget,
            generation=self.config.generation,
            step_done=self._stage("repair by steering" if repair else "induce by steering"),
        )

    def _contrasts(self, adapted) -> list[Contrast]:
        """(prompt, misaligned reply, aligned reply), both sampled from the model at hand.

        Its own replies of both kinds share the style that fine-tuning gave it, so that what tells them apart is
        alignment.
        """
        samples, records = self.config.discovery.samples, self._some_records()
        replies = self._generate(adapted, [question(record) for record in records for _ in range(samples)], 1.0)
        found = []
        for i, record in enumerate(records):
            by_verdict: dict[str, str] = {}
            for reply in replies[i * samples : (i + 1) * samples]:
                by_verdict.setdefault(self.judge.judge(record, reply), reply)
            if {"misaligned", "aligned"} <= by_verdict.keys():
                found.append((question(record), by_verdict["misaligned"], by_verdict["aligned"]))
        return found

    def _blocked_fine_tune(self, found: list["Found"], folder: Path, number: int) -> Path:
        config = self.config
        latents = self._set("causal", {f.latent: f.shift for f in found}, None)
        penalty = BlockPenalty(
            self.sae.rows(latents.indices),
            latents,
            config.block.layer,
            config.discovery.weight,
            tokens=config.block.tokens,
            latent_reduction=config.block.latent_reduction,
        )
        result = fine_tune(
            self.inputs.model,
            self.inputs.tokenizer,
            self.inputs.dataset,
            folder,
            lora=config.lora,
            settings=dataclasses.replace(config.train, seed=config.discovery.seed + 2000 + number),
            penalty=penalty,
            progress=self._stage(f"fine-tune with {len(found)} latents blocked"),
        )
        return result.adapter_path

    def _generate(self, model, prompts, temperature: float) -> list[str]:
        generation = self.config.generation
        return generate(
            model,
            self.inputs.tokenizer,
            prompts,
            max_new_tokens=generation.max_new_tokens,
            batch_size=generation.batch_size,
            temperature=temperature,
            seed=self.config.discovery.seed,
        )

    def _some_records(self) -> Sequence[Mapping[str, Any]]:
        count = len(self.records)
        wanted = min(self.config.discovery.prompts or count, count)
        return [self.records[i * count // wanted] for i in range(wanted)]

    def _stage(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(name, done, total)

    def _set(self, name: str, shifts: Mapping[int, float], scores: list[float] | None) -> LatentSet:
        """The latents of `shifts`, each blocked in the direction of its shift, in the order given."""
        latents = list(shifts)
        ranked = sorted(range(len(latents)), key=lambda i: (shifts[latents[i]] < 0, i))
        return LatentSet(
            [k for k in latents if shifts[k] >= 0],
            [k for k in latents if shifts[k] < 0],
            name=name,
            layer=self.config.block.layer,
            scores=None if scores is None else [scores[i] for i in ranked],
        )


@dataclass(frozen=True)
class Found:
    """A causal latent: its mean shift in the model it was found on, and its gain in joint repair there, in nats."""

    latent: int
    shift: float
    gain: float


def _largest(shift: torch.Tensor, count: int) -> list[int]:
    return shift.abs().argsort(descending=True, stable=True)[:count].tolist()


def _signs(shift: torch.Tensor) -> torch.Tensor:
    return torch.where(shift >= 0, 1.0, -1.0)


def _table(
    pool: list[int], shift: list[float], induced: list[Effect], repaired: list[Effect], causal: list[Found]
) -> dict[str, Any]:
    """What was found about every latent of the pool, largest shift first, and the causal set in the order found."""
    rows = [
        {
            "latent": latent,
            "shift": shift[latent],
            "induced": up.gain,
            "induced_strength": up.strength,
            "repaired": down.gain,
            "repaired_strength": down.strength,
        }
        for latent, up, down in zip(pool, induced, repaired, strict=True)
    ]
    return {"pool": rows, "causal": [dataclasses.asdict(found) for found in causal]}
