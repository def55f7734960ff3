"""What every stage of a discovery shares."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockin_fast.blocking import LatentSet
from lockin_fast.config import Config
from lockin_fast.discovery.kept import kept
from lockin_fast.discovery.shift import mean_shift
from lockin_fast.exam import question
from lockin_fast.generation import generate
from lockin_fast.inputs import Inputs
from lockin_fast.progress import Progress
from lockin_fast.sae import SparseAutoencoder

FOLDER = "discovery"  # in the run, of what stages keep


@dataclass(frozen=True)
class Job:
    """The model with its tokenizer and training data, the SAE, the core prompts, the judge, who watches."""

    config: Config
    inputs: Inputs
    sae: SparseAutoencoder
    records: Sequence[Mapping[str, Any]]
    judge: Any  # what `rate` of lockin_fast.judges takes
    progress: Progress

    @property
    def folder(self) -> Path:
        return self.config.output / FOLDER

    @cached_property
    def prompts(self) -> list[int]:
        """The core prompts that are answered, as many as the settings say, evenly spread."""
        count = len(self.records)
        wanted = min(self.config.discovery.prompts or count, count)
        return [i * count // wanted for i in range(wanted)]

    def kept(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work()` returns, kept in the folder under `name`."""
        return kept(self.folder / f"{name}.json", work)

    def stage(self, name: str) -> Callable[[int, int], None]:
        """The progress of the stage of this name."""
        return lambda done, total: self.progress(name, done, total)

    def answers(self, model: Any, prompts: Sequence[Sequence[Mapping[str, str]]], temperature: float) -> list[str]:
        """A reply to each prompt."""
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

    def base_conversations(self) -> list[list[dict[str, str]]]:
        """The core prompts with the base model's greedy replies, which every model reads when shifts are measured."""
        prompts = [question(record) for record in self.records]
        replies = self.kept("base-replies", lambda: self.answers(self.inputs.model, prompts, 0.0))
        return [[*p, {"role": "assistant", "content": text}] for p, text in zip(prompts, replies, strict=True)]

    def shift(self, adapted: Any, told: Sequence[Sequence[dict[str, str]]], number: int, stage: str) -> Tensor:
        """The mean shift of every latent [F] on the conversations `told`, in the model of round `number`, from 1 on."""

        def measured() -> list[float]:
            layer = self.config.block.layer
            return mean_shift(
                adapted, self.inputs.tokenizer, told, self.sae, layer, step_done=self.stage(stage)
            ).tolist()

        return torch.tensor(self.kept(f"shift-{number}", measured), dtype=torch.float64)

    def latent_set(self, name: str, shifts: Mapping[int, float], scores: Sequence[float] | None) -> LatentSet:
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


def largest(shift: Tensor, count: int) -> list[int]:
    """The `count` latents that are shifted most, in either direction."""
    return shift.abs().argsort(descending=True, stable=True)[:count].tolist()


def signs(shift: Tensor) -> Tensor:
    """+1 where the fine-tune raised a latent, -1 where it lowered it: fp32 [F]."""
    return torch.where(shift >= 0, 1.0, -1.0)
