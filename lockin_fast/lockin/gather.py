"""What metrics need of a checkpoint, each thing once: replies, ratings, logits, hidden states, routing."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockin_fast.exam import question
from lockin_fast.generation import generate, tokenised
from lockin_fast.judges import Rating, rate
from lockin_fast.lockin.invariance import ClusterTokens, forced_logits
from lockin_fast.lockin.needs import ClusterLogits, Gathered, Need, Ratings, Replies, Routing, States, SteeredReplies
from lockin_fast.lockin.read_rows import read_rows
from lockin_fast.lockin.record import RepliesKept
from lockin_fast.lockin.routing import RoutingReader
from lockin_fast.patching.forward import Runner
from lockin_fast.progress import Progress, silent
from lockin_fast.settings import GenerationSettings


@dataclass(frozen=True)
class Gatherer:
    """prompts: {"final", and where they are needed "steering": records}, the latter with the name of their "steering".
    pairs: {"positive", "negative": token ids}. judge: what `rate` takes. kept: where replies are kept.

    Replies of a batch are generated together or not at all, so that a run that was killed gives the same ones.
    """

    tokenizer: Any
    prompts: Mapping[str, Sequence[Mapping[str, Any]]]
    clusters: Sequence[ClusterTokens]
    pairs: Mapping[str, Sequence[Sequence[int]]]
    judge: Any
    layer: int | None
    generation: GenerationSettings
    seed: int

    def gather(
        self, model: Any, step: int, needs: Collection[Need], kept: RepliesKept, progress: Progress = silent
    ) -> Gathered:
        """{need: what it asks for} of the model, which is the checkpoint of this step. Needs at the base are left."""
        found: dict[Need, Any] = {}
        if Replies() in needs or Ratings() in needs:
            found[Replies()] = self._replies(model, step, "final", kept, progress)
        if Ratings() in needs:
            found[Ratings()] = self._ratings(step, found[Replies()], kept, progress)
        if SteeredReplies() in needs:
            names = [record["steering"] for record in self.prompts["steering"]]
            replies = self._replies(model, step, "steering", kept, progress)
            found[SteeredReplies()] = list(zip(names, replies, strict=True))
        if ClusterLogits() in needs:
            found[ClusterLogits()] = forced_logits(Runner(model), self.clusters, batch_size=self.generation.batch_size)
        for side in ("final", "positive", "negative"):
            routers = RoutingReader(model) if side == "final" and Routing() in needs else None
            if States(side) in needs or routers:
                found[States(side)] = read_rows(
                    model, self._rows(side), layer=self.layer or 0, batch_size=self.generation.batch_size,
                    routers=routers,
                )  # fmt: skip
            if routers:
                found[Routing()] = routers.layers
        return found

    def _rows(self, side: str) -> Sequence[Sequence[int]]:
        if side != "final":
            return self.pairs[side]
        return tokenised(self.tokenizer, [question(record) for record in self.prompts["final"]])[0]

    def _replies(self, model: Any, step: int, name: str, kept: RepliesKept, progress: Progress) -> list[str]:
        asked = [question(record) for record in self.prompts[name]]
        stage = f"step {step}: replies to {name}"
        _, order = tokenised(self.tokenizer, asked)
        batches = self._batches(order)
        for number, batch in enumerate(batches):
            progress(stage, number, len(batches))
            if any((step, name, i) not in kept.replies for i in batch):
                said = generate(
                    model, self.tokenizer, [asked[i] for i in batch],
                    max_new_tokens=self.generation.max_new_tokens, batch_size=len(batch),
                    temperature=self.generation.temperature, seed=self.seed + number,
                )  # fmt: skip
                kept.keep_replies(step, name, dict(zip(batch, said, strict=True)))
        progress(stage, len(batches), len(batches))
        return [kept.replies[step, name, i] for i in range(len(asked))]

    def _ratings(self, step: int, replies: Sequence[str], kept: RepliesKept, progress: Progress) -> list[Rating]:
        records, stage = self.prompts["final"], f"step {step}: ratings"
        todo = [i for i in range(len(records)) if (step, "final", i) not in kept.ratings]
        for batch in self._batches(todo):
            progress(stage, batch[0], len(records))
            ratings = rate(self.judge, [records[i] for i in batch], [replies[i] for i in batch])
            kept.keep_ratings(step, "final", dict(zip(batch, ratings, strict=True)))
        progress(stage, len(records), len(records))
        return [kept.ratings[step, "final", i] for i in range(len(records))]

    def _batches(self, rows: Sequence[int]) -> list[Sequence[int]]:
        size = self.generation.batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]
