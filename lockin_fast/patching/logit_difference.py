"""The effect of patches on what the model would rather say: cheap, since two given replies are only read."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from lockin_fast.patching.components import Component
from lockin_fast.patching.forward import Runner
from lockin_fast.patching.patched import PatchedRuns, Placed
from lockin_fast.patching.sides import Side, Sides
from lockin_fast.patching.sites import SIDES, Site
from lockin_fast.patching.spans import PromptTokens
from lockin_fast.patching.states import Clean, Dense, Pass, Source, run_both
from lockin_fast.patching.tokens import following, left_padded


@dataclass(frozen=True)
class Contrast:
    """A prompt with a misaligned and an aligned reply, as token ids."""

    prompt: PromptTokens
    misaligned: Sequence[int]
    aligned: Sequence[int]


@dataclass(frozen=True)
class Differences:
    """log p(misaligned reply) - log p(aligned reply), in nats, of every contrast: fp32, NaN where a site has no token.

    The two clean sides' [C], and under every patch [sites, C].
    """

    clean: dict[Side, Tensor]
    patched: Tensor


@torch.no_grad()
def differences(
    runner: Runner, sides: Sides, contrasts: Sequence[Contrast], wanted: Sequence[Site], *, batch_size: int,
    held: Callable[[Clean], Source] = Dense, seen: Callable[[Pass, list[int]], None] = lambda now, rows: None,
    step_done: Callable[[int, int], None] = lambda done, total: None,
) -> Differences:  # fmt: skip
    """Read the two replies of every contrast under the patch of every wanted site.

    batch_size: rows of a forward; sites of one layer and component fill it together. held: what is made of a clean run
    to patch from. seen: called with each pass over `batch_size // 2` contrasts, and their numbers, for what else is to
    be learnt from its states. Sites of the sides' clean runs are computed from the patch on: see `patched`.
    """
    result = torch.full((len(wanted), len(contrasts)), torch.nan)
    clean = {side: torch.empty(len(contrasts)) for side in ("base", "misaligned")}
    components = tuple(dict.fromkeys(site.component for site in wanted))
    order = sorted(range(len(contrasts)), key=lambda i: -len(contrasts[i].prompt.ids))  # little padding
    size, done = max(batch_size // 2, 1), 0
    for begin in range(0, len(order), size):
        numbers = order[begin : begin + size]
        now = contrast_pass(runner, sides, [contrasts[i] for i in numbers], components, held)
        seen(now, numbers)
        for side in clean:
            with sides.as_model(side):
                runs = PatchedRuns(runner, now.clean[side], now.source[side], "residual", len(runner.layers) - 1)
                clean[side][numbers] = runs.differences([Placed(row, ()) for row in range(len(numbers))]).cpu()
        for (direction, component, layer), group in groupby(
            enumerate(wanted), key=lambda item: (item[1].direction, item[1].component, item[1].layer)
        ):
            group = list(group)
            source, target = SIDES[direction]
            with sides.as_model(target):
                runs = PatchedRuns(runner, now.clean[target], now.source[source], component, layer)
                for cells, placed in batches(group, now.prompts, size):
                    found = runs.differences(placed).cpu()
                    for (site, row), value in zip(cells, found.tolist(), strict=True):
                        result[site, numbers[row]] = value
            done += len(group) * len(numbers)
            step_done(done, len(wanted) * len(contrasts))
    return Differences(clean, result)


def contrast_pass(
    runner: Runner, sides: Sides, contrasts: Sequence[Contrast], components: Sequence[Component],
    held: Callable[[Clean], Source] = Dense,
) -> Pass:  # fmt: skip
    """Run both sides over the contrasts: prompts [B, P], and the replies [2 B, R] to them, misaligned ones first."""
    tokens = left_padded([c.prompt.ids for c in contrasts], runner.device)
    twice = tokens.rows(torch.arange(len(contrasts), device=runner.device).repeat(2))
    replies = following(twice, [c.misaligned for c in contrasts] + [c.aligned for c in contrasts])
    return run_both(runner, sides, [c.prompt for c in contrasts], tokens, replies, components, held)


def batches(
    group: Sequence[tuple[int, Site]], prompts: Sequence[PromptTokens], size: int
) -> Iterator[tuple[list[tuple[int, int]], list[Placed]]]:
    """[(number of the site, row)] and their patches, `size` at a time; those that begin late together.

    What is left of the first patched token of a batch is not computed. Patches that leave the prompt as it is come in
    batches of their own.
    """
    length = max(len(prompt.ids) for prompt in prompts)
    found = []
    for number, site in group:
        for row, prompt in enumerate(prompts):
            if placed := site.placed(row, prompt, length):
                found.append(((number, row), placed))
    found.sort(key=lambda item: -1 if item[1].first is None else item[1].first)
    for _, alike in groupby(found, key=lambda item: item[1].first is None):
        alike = list(alike)
        for begin in range(0, len(alike), size):
            cells, placed = zip(*alike[begin : begin + size], strict=True)
            yield list(cells), list(placed)
