"""Replies under patches: token by token those of whole forwards with hooks, whatever shares a batch with them."""

import pytest
import tiny_families
import torch
from tiny_families import FAMILIES, LAYERS, PROMPTS

from lockin_fast.patching.decoding import Limits, Spoken, Start, decode, draws
from lockin_fast.patching.forward import Runner
from lockin_fast.patching.replies import Cell, patched_replies
from lockin_fast.patching.sides import Sides
from lockin_fast.patching.sites import SIDES, Site, sites
from lockin_fast.patching.spans import PromptTokens

TOKENS = 5
RENDERED = [PromptTokens(ids, {"user": [1, 2] if len(ids) > 3 else []}) for ids in PROMPTS]
LIMITS = Limits(frozenset(), TOKENS, rows=5)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny_families.adapted(request.param)


def next_logits(model, sides, site, prompt, said):
    """Logits of the next token by whole forwards: of the other side, then of this one with a hook."""
    ids = [*prompt.ids, *said]
    if not isinstance(site, Site):
        with sides.as_model(site):
            return tiny_families.states(model, ids)[0][-1]
    source, target = SIDES[site.direction]
    positions = list(prompt.positions(site.positions))
    if site.positions in ("all", "generated"):
        positions += range(len(prompt.ids), len(ids))
    with sides.as_model(source):
        states = tiny_families.states(model, ids)[1][site.component, site.layer]
    edit = tiny_families.replacing(states, positions, site.head)
    with sides.as_model(target):
        return tiny_families.states(model, ids, [(site.component, site.layer, edit)])[0][-1]


def brute_force(model, sides, cell, ends=(), choose=lambda logits, number: int(logits.argmax())):
    said = []
    while len(said) < TOKENS:
        token = choose(next_logits(model, sides, cell.site, RENDERED[cell.prompt], said), len(said))
        if token in ends:
            break
        said.append(token)
    return said


def every_cell():
    found = [Cell(side, prompt) for side in ("base", "misaligned") for prompt in range(len(PROMPTS))]
    residual = sites(("repair", "induce"), ("residual",), range(LAYERS), ("prefix", "last", "all", "generated"), 4)
    others = sites(("repair",), ("attention", "heads", "mlp"), (0, 2), ("prefix", "user"), 2)
    return found + [Cell(site, n % len(PROMPTS)) for n, site in enumerate([*residual, *others])]


def test_every_reply_is_that_of_whole_forwards_with_hooks(model):
    runner, sides, cells = Runner(model), Sides(model), every_cell()
    found = dict(patched_replies(runner, sides, RENDERED, cells, LIMITS))
    without = {cell for cell in cells if isinstance(cell.site, Site) and cell.site.positions == "user"
               and not RENDERED[cell.prompt].turns["user"]}  # fmt: skip
    assert without and found.keys() == set(cells) - without
    for cell, said in found.items():
        assert said == brute_force(model, sides, cell), cell
    assert len({tuple(said) for said in found.values()}) > 3  # patches do something


def test_a_reply_ends_at_its_end_and_others_take_its_place():
    model = tiny_families.adapted()
    runner, sides, cells = Runner(model), Sides(model), every_cell()
    plain = dict(patched_replies(runner, sides, RENDERED, cells, LIMITS))
    told = [token for said in plain.values() for token in said]
    ends = frozenset({max(set(told), key=told.count), plain[cells[0]][0]})
    found = dict(patched_replies(runner, sides, RENDERED, cells, Limits(ends, TOKENS, rows=2)))
    assert found.keys() == plain.keys() and found[cells[0]] == []
    for cell, said in plain.items():
        cut = next((n for n, token in enumerate(said) if token in ends), TOKENS)
        assert found[cell] == said[:cut]


def test_samples_depend_on_their_own_draws_alone():
    model = tiny_families.adapted()
    runner, sides = Runner(model), Sides(model)
    cells = [Cell(site, prompt, sample) for site in ("base", Site("repair", "residual", 1, "all"))
             for prompt in (0, 2) for sample in range(3)]  # fmt: skip
    limits = Limits(frozenset(), TOKENS, rows=4, temperature=0.7)
    found = dict(patched_replies(runner, sides, RENDERED, cells, limits, seed=3))
    for cell, said in found.items():
        uniform = draws(3, cell.prompt, cell.sample, TOKENS).tolist()

        def choose(logits, number, uniform=uniform):
            return int((logits.div(0.7).softmax(0).cumsum(0) > uniform[number]).nonzero()[0])

        assert said == brute_force(model, sides, cell, choose=choose), cell
    alone = dict(patched_replies(runner, sides, RENDERED, cells[4:5], limits, seed=3))
    assert alone == {cells[4]: found[cells[4]]}
    assert len({tuple(said) for said in found.values()}) > len(found) // 2


def test_starts_are_taken_only_as_places_get_free():
    model = tiny_families.adapted()
    sides, taken = Sides(model), []
    runner = Runner(model)
    read = runner.run(tiny_tokens(), watch=("keys_values",), logits_at=torch.tensor([[0, 2]]))
    kept = {layer: (keys[0], values[0]) for layer, (keys, values) in read.keys_values.items()}

    def starts():
        for number in range(7):
            taken.append(number)
            yield Start(number, kept, read.logits[0])

    replies = decode(model, sides, Spoken("base", "base"), starts(), Limits(frozenset(), TOKENS, rows=3))
    next(replies)
    assert len(taken) == 3
    assert len(list(replies)) == 6 and len(taken) == 7


def tiny_tokens():
    from lockin_fast.patching.tokens import left_padded

    return left_padded([PROMPTS[1]], "cpu")
