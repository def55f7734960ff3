"""The effect of patches on what the model says: replies under every site, generated from where the patch left off."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from lockin_fast.patching.decoding import Limits, Spoken, Start, decode, draws
from lockin_fast.patching.forward import Runner
from lockin_fast.patching.logit_difference import batches
from lockin_fast.patching.patched import PatchedRuns
from lockin_fast.patching.sides import Side, Sides
from lockin_fast.patching.sites import SIDES, Site
from lockin_fast.patching.spans import PromptTokens, covers_reply
from lockin_fast.patching.states import Clean, Dense, Pass, Source, run_both
from lockin_fast.patching.tokens import left_padded


@dataclass(frozen=True)
class Cell:
    """One reply: of a site, or of an unpatched side; to this prompt, the sample of this number."""

    site: Site | Side
    prompt: int
    sample: int = 0


def patched_replies(
    runner: Runner, sides: Sides, prompts: Sequence[PromptTokens], wanted: Collection[Cell], limits: Limits, *,
    seed: int = 0, held: Callable[[Clean], Source] = Dense,
) -> Iterator[tuple[Cell, list[int]]]:  # fmt: skip
    """(cell, tokens of its reply) of every wanted cell, as replies become complete.

    A site that covers prompt tokens alone leaves keys and values behind, from which the target side goes on by itself:
    replies of all such sites share batches. One that covers the reply ("generated", "all") is decoded by the source's
    layers up to the patch and the target's above it (`Spoken`), one layer's sites in a batch; those are of the residual
    stream alone. Cells without a token to patch are left out.
    Both sides read every prompt once; a site costs the layers above it, from its first token on.
    """
    by_prompt: dict[int, list[Cell]] = {}
    for cell in wanted:
        by_prompt.setdefault(cell.prompt, []).append(cell)
    order = sorted(by_prompt, key=lambda number: (-len(prompts[number].ids), number))
    components = tuple({cell.site.component: None for cell in wanted if isinstance(cell.site, Site)})
    for begin in range(0, len(order), limits.rows):
        numbers = order[begin : begin + limits.rows]
        some = [prompts[number] for number in numbers]
        tokens = left_padded([prompt.ids for prompt in some], runner.device)
        now = run_both(runner, sides, some, tokens, None, components, held)
        cells = [cell for number in numbers for cell in by_prompt[number]]
        for spoken, group in _streams(cells):
            starts = _starts(runner, sides, now, numbers, spoken, group, limits, seed)
            yield from decode(runner.model, sides, spoken, starts, limits)


def _streams(cells: Sequence[Cell]) -> Iterator[tuple[Spoken, list[Cell]]]:
    """Who speaks, and the cells that are spoken so."""
    found: dict[Spoken, list[Cell]] = {}
    for cell in cells:
        if not isinstance(cell.site, Site):
            spoken = Spoken(cell.site, cell.site)
        else:
            source, target = SIDES[cell.site.direction]
            decoded = covers_reply(cell.site.positions)
            spoken = Spoken(source, target, cell.site.layer) if decoded else Spoken(target, target)
        found.setdefault(spoken, []).append(cell)
    yield from found.items()


@torch.no_grad()
def _starts(
    runner: Runner, sides: Sides, now: Pass, numbers: Sequence[int], spoken: Spoken, cells: Sequence[Cell],
    limits: Limits, seed: int,
) -> Iterator[Start]:  # fmt: skip
    """The prompts of the cells, read under their patches, batch after batch as they are asked for."""
    row_of = {number: row for row, number in enumerate(numbers)}
    samples: dict[tuple[Site | Side, int], list[Cell]] = {}
    for cell in cells:
        samples.setdefault((cell.site, row_of[cell.prompt]), []).append(cell)

    def begun(site: Site | Side, row: int, own: tuple) -> Iterator[Start]:
        clean, above, logits = own
        pads = clean.prompts.input_ids.shape[1] - len(now.prompts[row].ids)
        kept = {
            layer: (keys[row, :, pads:], values[row, :, pads:])
            for layer, (keys, values) in now.clean[spoken.lower].prompt.keys_values.items()
        }
        kept |= {layer: (keys[:, pads:], values[:, pads:]) for layer, (keys, values) in above.items()}
        for cell in samples[site, row]:
            uniform = draws(seed, cell.prompt, cell.sample, limits.max_new_tokens) if limits.temperature else None
            yield Start(cell, kept, logits, uniform)

    target = now.clean[spoken.upper]
    for site, row in samples:
        if not isinstance(site, Site):
            yield from begun(site, row, (target, {}, target.prompt.logits[row]))
    patched = sorted({site for site, _ in samples if isinstance(site, Site)})
    for (_, component, layer), group in groupby(patched, key=lambda s: (s.direction, s.component, s.layer)):
        group = list(group)
        source = now.source[SIDES[group[0].direction][0]]
        runs = PatchedRuns(runner, target, source, component, layer)
        for places, placed in batches(list(enumerate(group)), now.prompts, limits.rows):
            wanted = [n for n, (site, row) in enumerate(places) if (group[site], row) in samples]
            if not wanted:
                continue
            with sides.as_model(spoken.upper):
                found = runs.prompts([placed[n] for n in wanted])
            for place, n in enumerate(wanted):
                site, row = places[n]
                above = {k: (keys[place], values[place]) for k, (keys, values) in found.keys_values.items()}
                yield from begun(group[site], row, (target, above, found.logits[place]))
