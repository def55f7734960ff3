"""A model that is steered along latents while it answers, and how its replies are rated."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lockin_fast.blocking.reference import Reference
from lockin_fast.discovery.kept import ReplyLog
from lockin_fast.exam import question
from lockin_fast.judges import Rating, average, rate
from lockin_fast.settings import GenerationSettings
from lockin_fast.steering import SteeredRow, generate_steered

Side = Literal["induce", "repair"]


class Dose(NamedTuple):
    """Along which latent a model is steered, and how strongly, in units of the median residual norm."""

    latent: int | None
    strength: float


PLAIN = Dose(None, 0.0)  # not steered
Rates = Mapping[Dose, Rating]
"""The rates (`lockin_fast.judges.average`) of the replies under each dose; `PLAIN` is always among them."""


@dataclass(frozen=True)
class Steered:
    """A model, the directions [d] of some latents, and the prompts it answers while it is steered along one of them.

    h <- h + strength * norm * unit(direction) at every position of decoder layer `layer`'s output, where norm is the
    median residual norm on the prompts asked about; replies are greedy. side "induce" steers along the direction, to
    raise misalignment; "repair" against it, to lower it. What `log` holds of this side is not asked again.
    """

    side: Side
    model: Any
    tokenizer: Any
    records: Sequence[Mapping[str, Any]]
    judge: Any  # what `rate` takes
    directions: Mapping[int, Tensor]
    layer: int
    norm: float
    generation: GenerationSettings
    log: ReplyLog

    def rates(
        self,
        doses: Sequence[Dose],
        prompts: Sequence[int],
        step_done: Callable[[int, int], None] = lambda done, total: None,
    ) -> dict[Dose, Rating]:
        """The rates of the replies to `records[i]`, i in `prompts`, under each dose, in the order of `doses`.

        Replies of many doses share a batch; each batch is judged, written to the log and flushed when it is finished.
        Costs len(doses) * len(prompts) replies, less what the log holds. step_done(replies, of all) counts those too.
        """
        wanted = [(dose, prompt) for dose in dict.fromkeys(doses) for prompt in prompts]
        missing = [(dose, prompt) for dose, prompt in wanted if self._key(dose, prompt) not in self.log.ratings]
        self._answer(missing, lambda done: step_done(len(wanted) - len(missing) + done, len(wanted)))
        return {
            dose: average([self.log.ratings[self._key(dose, prompt)] for prompt in prompts])
            for dose in dict.fromkeys(doses)
        }

    def _key(self, dose: Dose, prompt: int) -> tuple[Side, int | None, float, int]:
        return self.side, dose.latent, dose.strength, prompt

    def _answer(self, asked: Sequence[tuple[Dose, int]], replies_done: Callable[[int], None]) -> None:
        if not asked:
            return replies_done(0)
        prompts = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompt for _, prompt in asked))}
        latents = {latent: place for place, latent in enumerate(self.directions)}
        scale = self.norm if self.side == "induce" else -self.norm
        rows = [
            SteeredRow(prompts[prompt], latents.get(dose.latent, -1), dose.strength * scale) for dose, prompt in asked
        ]
        waiting: dict[int, str] = {}
        kept = 0

        def keep() -> None:
            nonlocal kept
            self._judge([asked[row] for row in waiting], list(waiting.values()))
            kept += len(waiting)
            waiting.clear()
            replies_done(kept)

        def finished(replies: Mapping[int, str]) -> None:
            waiting.update(replies)
            if len(waiting) >= self.generation.batch_size:
                keep()

        generate_steered(
            self.model,
            self.tokenizer,
            [question(self.records[prompt]) for prompt in prompts],
            rows,
            torch.stack(list(self.directions.values())).to(self.model.device),
            layer=self.layer,
            max_new_tokens=self.generation.max_new_tokens,
            batch_size=self.generation.batch_size,
            done=finished,
        )
        if waiting:
            keep()

    def _judge(self, asked: Sequence[tuple[Dose, int]], replies: Sequence[str]) -> None:
        ratings = rate(self.judge, [self.records[prompt] for _, prompt in asked], replies)
        self.log.add(
            [
                {
                    "side": self.side,
                    "latent": dose.latent,
                    "strength": dose.strength,
                    "prompt": prompt,
                    "reply": reply,
                    **_rates(rating if rating.rated else None),
                }
                for (dose, prompt), reply, rating in zip(asked, replies, ratings, strict=True)
            ]
        )


def table(rates: Rates, side: Side) -> list[dict[str, Any]]:
    """The rates as rows of a JSON file: {"latent", "side", "strength", "misaligned", "incoherent", "refused"}."""
    return [
        {"latent": dose.latent, "side": side, "strength": dose.strength, **_rates(rating)}
        for dose, rating in rates.items()
    ]


def _rates(rating: Rating | None) -> dict[str, float | None]:
    return {name: getattr(rating, name, None) for name in ("misaligned", "incoherent", "refused")}


@torch.no_grad()
def median_residual_norm(model: Any, tokenizer: Any, records: Sequence[Mapping[str, Any]], layer: int) -> float:
    """Median over tokens of the norm of the residual stream after decoder layer `layer`, on the prompts."""
    reference = Reference(model, layer, adapters=False)
    device = next(model.parameters()).device
    norms = []
    for record in records:
        text = tokenizer.apply_chat_template(question(record), tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(device)
        norms.append(reference.hidden_state((), {"input_ids": ids})[0].float().norm(dim=-1))
    return torch.cat(norms).median().item()
