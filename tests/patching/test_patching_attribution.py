"""Attribution patching: the slopes of whole forwards, and rank agreement."""

import copy

import pytest
import tiny_families
import torch
from test_logit_difference import CONTRASTS
from tiny_families import FAMILIES, LAYERS

from lockin_fast.patching.attribution import attributions, rank_agreement
from lockin_fast.patching.components import COMPONENTS
from lockin_fast.patching.forward import Runner
from lockin_fast.patching.logit_difference import contrast_pass
from lockin_fast.patching.sides import Sides
from lockin_fast.patching.sites import SIDES, sites

POSITIONS = ("prefix", "last", "generated", "all", "user", "1..3")


def slope(model, sides, site, contrast):
    """d/dt of the logit difference where a patch goes t of the way from target to source, at t = 0: whole forwards."""
    source, target = SIDES[site.direction]
    difference, t = 0.0, torch.zeros((), requires_grad=True)
    for reply, sign in ((contrast.misaligned, 1), (contrast.aligned, -1)):
        ids = [*contrast.prompt.ids, *reply]
        positions = list(contrast.prompt.positions(site.positions))
        if site.positions in ("all", "generated"):
            positions += range(len(contrast.prompt.ids), len(ids))
        key = site.component, site.layer
        with sides.as_model(source):
            there = tiny_families.states(model, ids)[1][key]
        with sides.as_model(target):
            here = tiny_families.states(model, ids)[1][key]
            edit = tiny_families.replacing(here + t.to(here) * (there - here), positions, site.head)
            logits = tiny_families.states(model, ids, [(*key, edit)], grad=True)[0]
        difference = difference + sign * tiny_families.logprob(logits, contrast.prompt.ids, reply)
    return torch.autograd.grad(difference, t)[0].item()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_is_the_slope_towards_the_source(family):
    model = tiny_families.adapted(family)
    runner, sides = Runner(model), Sides(model)
    wanted = sites(("induce",), COMPONENTS, range(LAYERS), POSITIONS, heads=4)[::5]
    now = contrast_pass(runner, sides, CONTRASTS, COMPONENTS)
    found = attributions(runner, sides, now, "induce", wanted)
    told = [(n, n % len(CONTRASTS)) for n, site in enumerate(wanted)
            if site.positions != "user" or CONTRASTS[n % len(CONTRASTS)].prompt.turns["user"]]  # fmt: skip
    assert [int(row.isnan().sum()) for row in found] == [int(site.positions == "user") for site in wanted]
    slopes = [slope(model, sides, wanted[n], CONTRASTS[c]) for n, c in told]
    wide = copy.deepcopy(model).double()
    exact = [slope(wide, Sides(wide), wanted[n], CONTRASTS[c]) for n, c in told]
    error = max(abs(a - b) for a, b in zip(slopes, exact, strict=True))  # of fp32, one whole run
    for (n, c), value in zip(told, exact, strict=True):
        assert found[n, c].item() == pytest.approx(value, rel=0, abs=4 * error), wanted[n]


def test_gradients_leave_nothing_behind():
    model = tiny_families.adapted()
    runner, sides = Runner(model), Sides(model)
    now = contrast_pass(runner, sides, CONTRASTS, COMPONENTS)
    attributions(runner, sides, now, "repair", sites(("repair",), COMPONENTS, (0,), ("all",), 4))
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("estimates", "effects", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 41], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, float("nan")], [1, 3, 2, 9], 0.5),
        ([1, 1, 2, 3], [1, 2, 3, 4], 0.9486832980505138),  # Pearson of the ranks 1.5, 1.5, 3, 4 and 1 to 4
        ([1, 1, 1], [1, 2, 3], None),
        ([1, 2], [1, 2], None),
    ],
)
def test_rank_agreement_is_spearmans(estimates, effects, expected):
    found = rank_agreement(torch.tensor(estimates, dtype=torch.float32), torch.tensor(effects, dtype=torch.float32))
    assert found == pytest.approx(expected) if expected is not None else found is None
