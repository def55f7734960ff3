"""What every stage of a discovery shares."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockin_fast import processes
from lockin_fast.blocking import LatentSet
from lockin_fast.config import Config
from lockin_fast.discovery.kept import kept
from lockin_fast.discovery.shift import mean_shift
from lockin_fast.discovery.shift_sums import ShiftStatistics
from lockin_fast.discovery.stage1 import stage_1
from lockin_fast.exam import question
from lockin_fast.generation import generate, tokenised
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
    more_saes: Mapping[int, SparseAutoencoder]  # by layer, of others than block.layer
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
        _, order = tokenised(self.inputs.tokenizer, prompts)
        size = self.config.generation.batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]

        def replies(number: int) -> list[str]:
            asked = [prompts[i] for i in batches[number]]
            return self.kept(f"base-replies-{number}", lambda: self.answers(self.inputs.model, asked, 0.0))

        for number in range(processes.rank(), len(batches), processes.count()):
            replies(number)
        processes.wait_for_all()
        told = {i: text for number, batch in enumerate(batches) for i, text in zip(batch, replies(number), strict=True)}
        return [[*prompt, {"role": "assistant", "content": told[i]}] for i, prompt in enumerate(prompts)]

    def shift(self, adapted: Any, told: Sequence[Sequence[dict[str, str]]], number: int, stage: str) -> Tensor:
        """The mean shift of every latent [F] on the conversations `told`, in the model of round `number`, from 1 on."""
        layer, tokenizer = self.config.block.layer, self.inputs.tokenizer
        if number == 1:
            return self.first_shift(adapted, told, stage)[layer].shift

        def measured() -> list[float]:
            return mean_shift(adapted, tokenizer, told, self.sae, layer, step_done=self.stage(stage)).tolist()

        return torch.tensor(self.kept(f"shift-{number}", measured), dtype=torch.float64)

    def first_shift(
        self, adapted: Any, told: Sequence[Sequence[dict[str, str]]], stage: str
    ) -> dict[int, ShiftStatistics]:
        """What stage 1 finds about every latent of every layer that is looked at."""
        saes = {self.config.block.layer: self.sae, **self.more_saes}
        return stage_1(adapted, self.inputs.tokenizer, told, saes, self.folder, self.stage(stage))

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
