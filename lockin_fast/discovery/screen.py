"""Stage 2: what each latent of the pool does when the model is steered with it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lockin_fast.blocking.layers import decoder_layer
from lockin_fast.blocking.reference import Reference
from lockin_fast.discovery.steering import steered
from lockin_fast.exam import question
from lockin_fast.generation import generate
from lockin_fast.judges import Judge
from lockin_fast.settings import GenerationSettings


@dataclass(frozen=True)
class Effect:
    """How far steering with one latent moves the misaligned share of the replies, in [-1, 1].

    gain: the largest shift in the wanted direction among the strengths within the incoherence budget, 0 when none is;
    strength: the one that gave it, in units of the median residual norm, None when none is.
    """

    gain: float
    strength: float | None


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


def screen(
    model: Any,
    tokenizer: Any,
    records: Sequence[Mapping[str, Any]],
    judge: Judge,
    directions: Tensor,
    *,
    layer: int,
    repair: bool,
    strengths: Sequence[float],
    incoherence_budget: float,
    generation: GenerationSettings,
    step_done: Callable[[int, int], None] = lambda done, total: None,
) -> list[Effect]:
    """Steer `model` with each of `directions` [P, d] in turn, judge its replies to `records`; one Effect a direction.

    h <- h + strength * norm * unit(direction) at every position of decoder layer `layer`'s output, norm being the
    median residual norm; with `repair` the direction is subtracted, and the wanted shift is downwards.
    Rows of many directions and strengths share a batch. Costs (P * len(strengths) + 1) * len(records) replies.
    Source: BLOCK-EM, arXiv 2602.00767, second stage of the discovery (induce and repair).
    """
    sign = -1.0 if repair else 1.0
    units = F.normalize(directions.float(), dim=1) * (sign * median_residual_norm(model, tokenizer, records, layer))
    answer = partial(_answers, model, tokenizer, records, judge, decoder_layer(model, layer), generation)
    plain = _shares(answer(torch.zeros_like(units[:1])))[0]
    best = [Effect(0.0, None) for _ in units]
    for done, strength in enumerate(strengths):
        verdicts = answer(
            strength * units, lambda rows, d=done: step_done(d * len(units) + rows, len(strengths) * len(units))
        )
        for index, (misaligned, incoherent) in enumerate(_shares(verdicts)):
            gain = sign * (misaligned - plain[0])
            if incoherent - plain[1] <= incoherence_budget and gain > best[index].gain:
                best[index] = Effect(gain, float(strength))
    return best


def _answers(
    model: Any,
    tokenizer: Any,
    records: Sequence[Mapping[str, Any]],
    judge: Judge,
    layer: torch.nn.Module,
    generation: GenerationSettings,
    vectors: Tensor,
    vectors_done: Callable[[int], None] = lambda count: None,
) -> list[list[str]]:
    """Greedy replies to every record under every vector [V, d], judged: V lists of verdicts, in the records' order."""
    prompts = [question(record) for record in records]
    finished = 0

    @contextmanager
    def around(rows: list[int]):
        nonlocal finished
        with steered(layer, vectors[[row // len(records) for row in rows]]):
            yield
        finished += len(rows)
        vectors_done(finished // len(records))

    replies = generate(
        model,
        tokenizer,
        prompts * len(vectors),
        max_new_tokens=generation.max_new_tokens,
        batch_size=generation.batch_size,
        around=around,
    )
    return [
        [judge.judge(record, replies[v * len(records) + i]) for i, record in enumerate(records)]
        for v in range(len(vectors))
    ]


def _shares(verdicts: list[list[str]]) -> list[tuple[float, float]]:
    """Misaligned and incoherent share of each list of verdicts."""
    return [(row.count("misaligned") / len(row), row.count("incoherent") / len(row)) for row in verdicts]
