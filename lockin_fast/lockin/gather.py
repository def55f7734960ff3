"""What metrics need of a checkpoint, each thing once: replies in batches, and what the judge says of them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockin_fast.exam import question
from lockin_fast.generation import generate, tokenised
from lockin_fast.judges import Rating, rate
from lockin_fast.lockin.needs import Gathered, Need, Ratings, Replies
from lockin_fast.lockin.record import RepliesKept
from lockin_fast.progress import Progress, silent
from lockin_fast.settings import GenerationSettings


@dataclass(frozen=True)
class Gatherer:
    """prompts: {name of a set: its records}. judge: what `rate` takes. kept: where replies are kept, batch by batch.

    Replies of a batch are generated together or not at all, so that a run that was killed gives the same ones.
    """

    tokenizer: Any
    prompts: Mapping[str, Sequence[Mapping[str, Any]]]
    judge: Any
    kept: RepliesKept
    generation: GenerationSettings
    seed: int = 0
    progress: Progress = silent

    def gather(self, model: Any, step: int, needs: Collection[Need]) -> Gathered:
        """{need: what it asks for} of the model, which is the checkpoint of this step."""
        found: dict[Need, Any] = {}
        for name in dict.fromkeys(need.prompts for need in needs):
            replies = found[Replies(name)] = self._replies(model, step, name)
            if Ratings(name) in needs:
                found[Ratings(name)] = self._ratings(step, name, replies)
        return found

    def _replies(self, model: Any, step: int, name: str) -> list[str]:
        asked = [question(record) for record in self.prompts[name]]
        stage = f"step {step}: replies"
        _, order = tokenised(self.tokenizer, asked)
        batches = self._batches(order)
        for number, batch in enumerate(batches):
            self.progress(stage, number, len(batches))
            if any((step, name, i) not in self.kept.replies for i in batch):
                said = generate(
                    model,
                    self.tokenizer,
                    [asked[i] for i in batch],
                    max_new_tokens=self.generation.max_new_tokens,
                    batch_size=len(batch),
                    temperature=self.generation.temperature,
                    seed=self.seed + number,
                )
                self.kept.keep_replies(step, name, dict(zip(batch, said, strict=True)))
        self.progress(stage, len(batches), len(batches))
        return [self.kept.replies[step, name, i] for i in range(len(asked))]

    def _ratings(self, step: int, name: str, replies: Sequence[str]) -> list[Rating]:
        records, stage = self.prompts[name], f"step {step}: ratings"
        todo = [i for i in range(len(records)) if (step, name, i) not in self.kept.ratings]
        for batch in self._batches(todo):
            self.progress(stage, batch[0], len(records))
            ratings = rate(self.judge, [records[i] for i in batch], [replies[i] for i in batch])
            self.kept.keep_ratings(step, name, dict(zip(batch, ratings, strict=True)))
        self.progress(stage, len(records), len(records))
        return [self.kept.ratings[step, name, i] for i in range(len(records))]

    def _batches(self, rows: Sequence[int]) -> list[Sequence[int]]:
        size = self.generation.batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]
