"""Logit differences under patches: every site against a whole forward with a hook, and what must be so in any case."""

from contextlib import nullcontext

import pytest
import tiny_families
import torch
from tiny_families import FAMILIES, LAYERS, PROMPTS, REPLIES

from lockin_fast.patching import logit_difference
from lockin_fast.patching.components import COMPONENTS
from lockin_fast.patching.forward import Runner
from lockin_fast.patching.logit_difference import Contrast, differences
from lockin_fast.patching.patched import _of_like_length
from lockin_fast.patching.sides import Sides
from lockin_fast.patching.sites import SIDES, sites
from lockin_fast.patching.spans import PromptTokens
from lockin_fast.patching.states import FourBit

POSITIONS = ("prefix", "last", "generated", "all", "user", "1..3", "-2..")
CONTRASTS = [
    Contrast(PromptTokens(ids, {"user": [1, 2] if len(ids) > 3 else []}), misaligned, aligned)
    for ids, misaligned, aligned in zip(PROMPTS, *REPLIES, strict=True)
]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny_families.adapted(request.param)


EVERY = sites(("repair", "induce"), COMPONENTS, range(LAYERS), POSITIONS, heads=4)
SOME = EVERY[::11]  # 11 divides the number of neither layers, heads nor positions: all of them occur


@pytest.fixture(scope="module")
def swept(model):
    """(runner, sides, some sites, their differences)."""
    runner, sides = Runner(model), Sides(model)
    return runner, sides, SOME, differences(runner, sides, CONTRASTS, SOME, batch_size=16)


def brute_force(model, sides, site, contrast):
    """One whole forward a reply, with a hook that puts the other side's states in."""
    source, target = SIDES[site.direction]
    scores = []
    for reply in (contrast.misaligned, contrast.aligned):
        ids = [*contrast.prompt.ids, *reply]
        positions = list(contrast.prompt.positions(site.positions))
        if site.positions in ("all", "generated"):
            positions += range(len(contrast.prompt.ids), len(ids))
        with sides.as_model(source):
            _, states = tiny_families.states(model, ids)
        edit = tiny_families.replacing(states[site.component, site.layer], positions, site.head)
        with sides.as_model(target):
            logits, _ = tiny_families.states(model, ids, [(site.component, site.layer, edit)])
        scores.append(tiny_families.logprob(logits, contrast.prompt.ids, reply))
    return (scores[0] - scores[1]).item()


def check(model, sides, wanted, found):
    errors, values = [], []
    for number, site in enumerate(wanted):
        for column, contrast in enumerate(CONTRASTS):
            value = found.patched[number, column]
            if site.positions == "user" and not contrast.prompt.turns["user"]:
                assert value.isnan()
                continue
            expected = brute_force(model, sides, site, contrast)
            errors.append((abs(value.item() - expected), site, column))
            values.append(expected)
    worst = max(errors, key=lambda e: e[0])
    assert worst[0] < tiny_families.fp32_error(model) * max(map(abs, values)), worst
    assert len(set(values)) > len(values) // 2  # patches do something


def test_a_site_is_what_a_whole_forward_with_a_hook_gives(model, swept):
    _, sides, wanted, found = swept
    check(model, sides, wanted, found)


@pytest.mark.slow  # 1,764 whole forwards a family
def test_every_site_is_what_a_whole_forward_with_a_hook_gives(model):
    runner, sides = Runner(model), Sides(model)
    check(model, sides, EVERY, differences(runner, sides, CONTRASTS, EVERY, batch_size=16))


def test_the_clean_sides_are_the_models(model, swept):
    _, sides, _, found = swept
    for side in ("base", "misaligned"):
        for column, c in enumerate(CONTRASTS):
            with sides.as_model(side):
                scores = [
                    tiny_families.logprob(tiny_families.states(model, [*c.prompt.ids, *r])[0], c.prompt.ids, r)
                    for r in (c.misaligned, c.aligned)
                ]
            assert found.clean[side][column].item() == pytest.approx((scores[0] - scores[1]).item(), abs=1e-4)


def test_all_positions_of_the_last_layer_give_the_source(swept):
    """Above it are the norm and the unembedding, which the adapter leaves alone."""
    runner, sides, _, swept_all = swept
    wanted = sites(("repair", "induce"), ("residual",), (LAYERS - 1,), ("all",), heads=4)
    found = differences(runner, sides, CONTRASTS, wanted, batch_size=16)
    for side, patched in zip(("base", "misaligned"), found.patched, strict=True):
        assert torch.equal(patched, found.clean[side])
    assert torch.equal(found.clean["base"], swept_all.clean["base"])


def test_a_run_patched_with_itself_stays_the_same_bit_by_bit(model, monkeypatch):
    runner, sides = Runner(model), Sides(model)
    plain = differences(runner, sides, CONTRASTS, [], batch_size=6).clean["base"]
    sites_of = {}
    for site in sites(("repair",), COMPONENTS, range(LAYERS), ("prefix", "all"), heads=2):
        sites_of.setdefault((site.positions, site.component, site.head), []).append(site)  # same rows as clean
    with sides.as_model("base"):
        monkeypatch.setattr(sides, "as_model", lambda side: nullcontext())  # both sides are the base
        for wanted in sites_of.values():
            found = differences(runner, sides, CONTRASTS, wanted, batch_size=6)
            for site, patched in zip(wanted, found.patched, strict=True):
                assert torch.equal(patched, plain), site


def test_the_size_of_batches_does_not_matter(swept):
    runner, sides, wanted, found = swept
    some = [site for site in wanted if site.component in ("residual", "heads") and site.direction == "induce"]
    again = differences(runner, sides, CONTRASTS, some, batch_size=2)
    picked = found.patched[[wanted.index(site) for site in some]]
    torch.testing.assert_close(again.patched, picked, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_nothing_is_computed_that_cannot_change(model, monkeypatch):
    """Layers and tokens that every site of a batch runs are those from its patch on."""
    runner, sides = Runner(model), Sides(model)
    seen = []
    run = runner.run

    def counted(tokens, **options):
        seen.append((options.get("start", 0), tuple(tokens.input_ids.shape)))
        return run(tokens, **options)

    monkeypatch.setattr(runner, "run", counted)
    wanted = sites(("repair",), ("residual",), (1,), ("last", "generated"), heads=4)
    differences(runner, sides, CONTRASTS, wanted, batch_size=6)
    assert seen[:4] == 2 * [(0, (3, 7)), (0, (6, 3))]  # both sides, clean
    assert seen[4:6] == 2 * [(LAYERS, (4, 3))]  # their logits; two of six replies have one token, which is foretold
    assert seen[6:] == [(2, (4, 3)), (2, (3, 1)), (2, (4, 3))]  # replies; the last token of each prompt; replies


def test_replies_of_like_length_share_a_forward():
    lengths = [90, 10, 80, 0, 40, 90, *[80] * 9, *[30] * 20]
    groups = _of_like_length(lengths)
    assert sorted(n for group in groups for n in group) == [n for n, length in enumerate(lengths) if length]
    assert [[lengths[n] for n in group] for group in groups] == [[90, 90, *[80] * 10], [40, *[30] * 20], [10]]
    assert len(_of_like_length([9] * 10 + [1] * 10)) == 1  # too few to be worth two forwards


@pytest.mark.parametrize("component", COMPONENTS)
def test_four_bits_patch_with_what_they_decode_to(component, monkeypatch):
    """The same as with the decoded states as they are."""

    class Decoded(logit_difference.Dense):
        def take(self, part, component, layer, at, heads):
            taken = FourBit(self.clean).take(part, component, layer, at, heads)
            return taken if isinstance(taken, torch.Tensor) else taken.dequantize()

    model = tiny_families.adapted()
    runner, sides = Runner(model), Sides(model)
    wanted = sites(("repair",), (component,), (1,), ("prefix", "all"), heads=4)
    packed = differences(runner, sides, CONTRASTS, wanted, batch_size=6, held=FourBit)
    decoded = differences(runner, sides, CONTRASTS, wanted, batch_size=6, held=Decoded)
    assert torch.equal(packed.patched, decoded.patched)
    exact = differences(runner, sides, CONTRASTS, wanted, batch_size=6)
    assert not torch.equal(packed.patched, exact.patched)
