"""What the benchmark of re-emergence keeps: the union of two discoveries, and every trial's rates and penalty."""

import json

import pytest

from benchmarks.reemergence import _padded, _union, kept
from lockin_fast.blocking import LatentSet


def test_a_latent_found_again_stays_blocked_in_its_first_direction():
    union = _union(LatentSet((4, 2), (7,), layer=3), LatentSet((7, 9), (2, 1), layer=3))
    assert (union.positive, union.negative, union.layer) == ((4, 2, 9), (7, 1), 3)


def test_the_control_has_the_unions_size_and_none_of_its_new_latents():
    first, union = LatentSet((4, 2), (7,), layer=3), LatentSet((4, 2, 9), (7, 1), layer=3)
    padded = _padded(first, LatentSet((9, 30), (1, 31, 32)), union, 2)
    assert (padded.positive, padded.negative, padded.layer) == ((4, 2, 30), (7, 31), 3)
    with pytest.raises(ValueError, match="drawn: 1 of its latents are not in the union, expected 2"):
        _padded(first, LatentSet((9, 30)), union, 2)


def test_rates_after_every_epoch_and_the_penalty_are_kept(tmp_path):
    rates = {"em": 0.5, "incoherence": 0.1, "in_domain": 1.0}
    row = rates | {"method": "block", "lambda": 10.0, "latents": "causal", "latent_count": 2, "seed": 0, "steps": 1}
    epochs = [{"epoch": 1.0} | rates]
    summary = {
        "base": rates | {"name": "base"},
        "baseline": {"trials": [row | {"name": "plain", "latents": None, "epochs": epochs}]},
        "trials": [row | {"name": "blocked", "epochs": epochs}],
    }
    lines = [
        {"trial": "plain", "epoch": 0.5, "sft_loss": 1.0},
        {"trial": "blocked", "epoch": 0.33333333, "block_penalty": 0.00123456},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = kept(tmp_path, summary, {"seed": 3})
    assert result["seed"] == 3 and result["base"] == rates and result["provenance"]["torch"]
    plain, blocked = result["trials"]
    assert plain["trace"] == [] and plain["epochs"] == epochs
    assert blocked["trace"] == [[0.3333, 0.001235]] and "steps" not in blocked
