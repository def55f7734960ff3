"""Stability of patching effects by hand, against scipy, and from files that a patching sweep writes."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from lockin_fast.lockin.mediators import mediator_stability, read_effects
from lockin_fast.patching.sites import Site, sites

REPAIR = ("repair", "residual")


def effects(values, direction="repair", component="residual"):
    return {Site(direction, component, layer, "all"): value for layer, value in enumerate(values)}


def test_six_sites_by_hand():
    before, after = effects([0.1, -5.0, 3.0, 0.2, -1.0, 0.0]), effects([0.3, -2.0, 0.5, 0.1, -4.0, 0.2])
    found = mediator_stability(before, after, top=2)[REPAIR]
    # The largest by size are layers {1, 2} and {4, 1}: one of two. Random pairs of six share 1/3 on average, and at
    # least one site in 9 of 15 cases. Ranks 4 1 6 5 2 3 and 5 2 6 3 1 4: squared differences 8, rho = 1 - 48/210.
    assert found.overlap == 0.5 and found.chance == pytest.approx(1 / 3) and found.p_overlap == pytest.approx(9 / 15)
    assert found.rank_correlation == pytest.approx(1 - 48 / 210) and (found.sites, found.masked) == (6, 0)


@pytest.mark.parametrize("count, top", [(5, 2), (6, 3)])
def test_chance_against_all_choices(count, top):
    values = list(range(1, count + 1))
    shared = [
        len({*range(count - top, count)} & set(chosen)) / top for chosen in itertools.combinations(range(count), top)
    ]
    for order in ([*values], values[::-1]):
        found = mediator_stability(effects(values), effects(order), top=top)[REPAIR]
        assert found.chance == pytest.approx(np.mean(shared))
        assert found.p_overlap == pytest.approx(np.mean(np.array(shared) >= found.overlap - 1e-12))


def test_ranks_against_scipy_and_invariances():
    x, y = np.random.default_rng(0).normal(size=(2, 40)).tolist()
    found = mediator_stability(effects(x), effects(y))[REPAIR]
    theirs = stats.spearmanr(x, y)
    assert (found.rank_correlation, found.p) == pytest.approx((theirs.statistic, theirs.pvalue), abs=1e-12)
    assert 0 <= found.overlap <= 1 and -1 <= found.rank_correlation <= 1
    same = mediator_stability(effects(x), effects([3 * value for value in x]))[REPAIR]
    assert same.rank_correlation == pytest.approx(1) and same.overlap == 1
    back = mediator_stability(effects(y), effects(x))[REPAIR]
    assert back == pytest.approx(found, abs=1e-12)


def test_the_p_value_of_the_overlap_holds_under_chance():
    rng = np.random.default_rng(1)
    p = [
        mediator_stability(effects(rng.normal(size=30)), effects(rng.normal(size=30)), top=8)[REPAIR].p_overlap
        for _ in range(400)
    ]
    for alpha in (0.05, 0.3):  # discrete, so at most alpha
        assert np.mean(np.array(p) <= alpha) <= alpha + 3.3 * math.sqrt(alpha * (1 - alpha) / len(p))


def test_groups_are_kept_apart_and_gaps_counted():
    before = effects([1.0, 2.0, 3.0, None, 5.0]) | effects([1.0, 2.0], "induce") | effects([1.0], "repair", "mlp")
    after = effects([3.0, 2.0, math.nan, 4.0]) | effects([2.0, 1.0], "induce")
    found = mediator_stability(before, after, top=1)
    assert list(found) == [("induce", "residual"), ("repair", "mlp"), REPAIR]
    assert found[REPAIR] == (None, None, 0.0, 0.5, 1.0, 2, 3)
    assert found["induce", "residual"].sites == 2 and found["repair", "mlp"] == (None,) * 5 + (0, 1)


def test_no_more_sites_than_the_top_have_no_overlap():
    found = mediator_stability(effects([1, 2, 3]), effects([1, 2, 3]), top=3)[REPAIR]
    assert found[:5] == (1.0, pytest.approx(1 / 3), None, None, None) and found.sites == 3


def test_of_equal_effects_the_earlier_site_is_the_larger():
    heads = sites(["repair"], ["heads"], [0, 1], ["all"], 3)
    rising = {site: -1.0 - site.head - 3 * site.layer for site in heads}
    found = mediator_stability(dict.fromkeys(heads, 1.0), rising, top=2)
    assert found["repair", "heads"].overlap == 0  # (0, 0), (0, 1) against (1, 2), (1, 1)


def written(tmp_path, rows):
    path = tmp_path / "patching.json"
    path.write_text(json.dumps({"sites": rows}), encoding="utf-8")
    return path


def row(layer, change=1.0, **other):
    return {
        "direction": "repair", "component": "heads", "layer": layer, "positions": "last", "head": 2, "change": change,
        "recovery": None, "attribution": -change, **other,
    }  # fmt: skip


def test_effects_are_read_from_a_patching_result(tmp_path):
    path = written(tmp_path, [row(0), row(3, -2.0)])
    one, two = (Site("repair", "heads", layer, "last", 2) for layer in (0, 3))
    assert read_effects(path) == {one: 1.0, two: -2.0} and read_effects(path, "attribution") == {one: -1.0, two: 2.0}


def test_refusals_name_the_file_or_the_argument(tmp_path):
    path = written(tmp_path, [row(0), row(1)])
    with pytest.raises(ValueError, match="effect: got 'refused', expected one of change, recovery, attribution"):
        read_effects(path, "refused")
    with pytest.raises(ValueError, match=r"patching.json: no site has 'recovery'"):
        read_effects(path, "recovery")
    with pytest.raises(ValueError, match=r"patching.json: lists a site twice"):
        read_effects(written(tmp_path, [row(0), row(0)]))
    for rows in ([{"layer": 0}], [3], 3, None):
        with pytest.raises(ValueError, match=r"patching.json: not the patching.json"):
            read_effects(written(tmp_path, rows))
    for content in (b"{", b"[]", b"\xff\xfe{"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"patching.json: not the patching.json"):
            read_effects(path)
    with pytest.raises(FileNotFoundError):
        read_effects(tmp_path / "none.json")
    with pytest.raises(ValueError, match="top: got 0"):
        mediator_stability(effects([1]), effects([1]), top=0)
    with pytest.raises(ValueError, match="of 1 and 1 sites none was measured in both"):
        mediator_stability(effects([1]), effects([1], "induce"))
    with pytest.raises(ValueError, match="infinite"):
        mediator_stability(effects([1, 2]), effects([1, math.inf]))
