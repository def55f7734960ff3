"""The states that a sweep patches with and starts from: one side's clean run over a batch, as it is or in four bits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lockin_fast.cache.hidden_states import HiddenStateCache
from lockin_fast.ops.nf4 import BLOCKSIZES
from lockin_fast.ops.nf4_tensor import NF4Tensor, outlier_channels, quantize_nf4
from lockin_fast.patching.components import Component
from lockin_fast.patching.forward import KeysValues, Outcome, Runner
from lockin_fast.patching.sides import Side, Sides
from lockin_fast.patching.spans import PromptTokens
from lockin_fast.patching.tokens import Tokens

OUTLIERS = 8  # channels of an NF4 source that are kept as they are
Part = Literal["prompt", "reply"]


@dataclass(frozen=True)
class Clean:
    """A clean run of one side: prompts [B, P], and the two replies to each as 2 B rows [2 B, R] that follow them.

    Row b of the prompts goes on in the rows b and B + b of the replies, which are None where none was given. What a
    reply's last token makes the model say next is not asked, so that column is not run.
    """

    prompts: Tokens
    replies: Tokens | None
    prompt: Outcome  # logits [B, V] of the prompts' last tokens
    reply: Outcome | None


def run_clean(runner: Runner, prompts: Tokens, replies: Tokens | None, components: Sequence[Component]) -> Clean:
    """Run the model as it now stands over a batch, the prompts once for all of their replies; keep `components`."""
    watch = {"residual", "keys_values", *components}
    prompt = runner.run(prompts, watch=watch, logits_at=last_column(prompts))
    if replies is None:
        return Clean(prompts, None, prompt, None)
    past = taken(prompt.keys_values, torch.arange(len(prompts.input_ids), device=runner.device).repeat(2))
    read = replies.without_last()
    reply = runner.run(read, past=past, watch=watch - {"keys_values"}) if read.input_ids.shape[1] else None
    return Clean(prompts, replies, prompt, reply)


@dataclass(frozen=True)
class Pass:
    """The two sides' clean runs over some prompts, from which every site is computed."""

    prompts: Sequence[PromptTokens]
    clean: dict[Side, Clean]
    source: dict[Side, "Source"]


@torch.no_grad()
def run_both(
    runner: Runner, sides: Sides, prompts: Sequence[PromptTokens], tokens: Tokens, replies: Tokens | None,
    components: Sequence[Component], held: "Callable[[Clean], Source]",
) -> Pass:  # fmt: skip
    """Run both sides over the prompts, whose tokens those are, and over their replies; `held` makes sources of them."""
    clean = {}
    for side in ("base", "misaligned"):
        with sides.as_model(side):
            clean[side] = run_clean(runner, tokens, replies, components)
    return Pass(prompts, clean, {side: held(run) for side, run in clean.items()})


class Source(Protocol):
    """Where the states that are patched in come from."""

    def take(self, part: Part, component: Component, layer: int, at: Tensor, heads: Tensor | None) -> Any:
        """The component's output [P, d] of `layer` at (row, column) of `at` [P, 2], dense or an NF4Tensor.

        With `heads` [P], of one head each: [P, head_dim].
        """
        ...


@dataclass(frozen=True)
class Dense:
    """States as the source's clean run left them."""

    clean: Clean

    def take(self, part: Part, component: Component, layer: int, at: Tensor, heads: Tensor | None) -> Tensor:
        states = getattr(self.clean, part).watched[component][layer]
        return states[at[:, 0], at[:, 1]] if heads is None else states[at[:, 0], at[:, 1], heads]


class FourBit:
    """States in NF4, their largest channels as they are: about a quarter of the memory of 16 bits.

    Raises ValueError for a width that no blocksize divides.
    """

    def __init__(self, clean: Clean):
        self._held: dict[tuple[str, str, int], tuple[NF4Tensor, torch.Size]] = {}
        for part, outcome in (("prompt", clean.prompt), ("reply", clean.reply)):
            for component, layers in outcome.watched.items() if outcome else ():
                for layer, states in layers.items():
                    self._held[part, component, layer] = four_bits(states.flatten(2)), states.shape[2:]

    def take(self, part: Part, component: Component, layer: int, at: Tensor, heads: Tensor | None) -> Any:
        held, shape = self._held[part, component, layer]
        rows = held.rows(at[:, 0] * held.shape[1] + at[:, 1])
        if heads is None:
            return rows
        return rows.dequantize().view(-1, *shape)[torch.arange(len(at), device=at.device), heads]


class Cached:
    """The base's states of prompts in NF4, from caches on disk by layer: no source forward has to be kept for them."""

    def __init__(self, clean: Clean, caches: Mapping[int, HiddenStateCache]):
        self._tokens, self._caches = clean.prompts, caches

    def take(self, part: Part, component: Component, layer: int, at: Tensor, heads: Tensor | None) -> NF4Tensor:
        if (part, component) != ("prompt", "residual"):
            raise ValueError(f"source: a cache holds the residual stream of prompts; got {component} of the {part}")
        rows = at[:, 0].unique()
        ids, mask = self._tokens.input_ids[rows].cpu(), self._tokens.attention_mask[rows].cpu()
        held = self._caches[layer].hidden_states(ids, mask)
        place = torch.searchsorted(rows, at[:, 0].contiguous())
        return held.rows((place * ids.shape[1] + at[:, 1]).cpu()).to(at.device)


def four_bits(states: Tensor) -> NF4Tensor:
    """States [..., d] in NF4, some channels as they are; see `cut`."""
    blocksize, outliers = cut(states.shape[-1])
    return quantize_nf4(states.contiguous(), blocksize=blocksize, outliers=outlier_channels(states, outliers))


def cut(width: int) -> tuple[int, int]:
    """(blocksize, number of channels kept as they are) of states in NF4; ValueError where no blocksize divides d."""
    blocksize = next((size for size in (64, *BLOCKSIZES) if width % size == 0), None)
    if blocksize is None:
        raise ValueError(f"source: states are {width} wide, a multiple of none of NF4's blocks; take source: live")
    return blocksize, min(OUTLIERS, width // 8)


def taken(keys_values: KeysValues, rows: Tensor, columns: int | None = None) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values of these rows, of all columns or of so many first ones."""
    return {
        layer: (keys[rows, :, :columns], values[rows, :, :columns]) for layer, (keys, values) in keys_values.items()
    }


def last_column(tokens: Tokens) -> Tensor:
    """(row, column) of every row's last column, for prompts that are padded on the left."""
    count, length = tokens.input_ids.shape
    rows = torch.arange(count, device=tokens.input_ids.device)
    return torch.stack([rows, torch.full_like(rows, length - 1)], 1)


def logprobs(clean_logits: Tensor, targets: Tensor) -> Tensor:
    """log p of the target tokens [N] under logits [N, V], in fp32."""
    return -torch.nn.functional.cross_entropy(clean_logits.float(), targets, reduction="none")

