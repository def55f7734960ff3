"""LatentSet: what it refuses, how it is written and read, and what take and union pick."""

import json

import pytest
import torch

from lockin_fast.blocking import LatentSet


def test_indices_and_signs_run_positive_then_negative():
    latents = LatentSet((5, 2), (9,))
    assert len(latents) == 3
    assert latents.indices.tolist() == [5, 2, 9] and latents.indices.dtype == torch.int64
    assert latents.signs.tolist() == [1, 1, -1] and latents.signs.dtype == torch.float32


@pytest.mark.parametrize(
    ("positive", "negative", "error", "message"),
    [
        ((1, 2), (2,), ValueError, r"latents \[2\] are in both"),
        ((1, 1), (), ValueError, r"positive: latents \[1\] are listed twice"),
        ((), (-3,), ValueError, "negative: got latent index -3"),
        ((1.5,), (), TypeError, "positive: got 1.5, expected integer"),
        ((True,), (), TypeError, "positive: got True"),
        ("12", (), TypeError, "positive: got str"),
    ],
)
def test_bad_indices_are_refused(positive, negative, error, message):
    with pytest.raises(error, match=message):
        LatentSet(positive, negative)


def test_scores_must_match_and_layer_must_be_an_index():
    with pytest.raises(ValueError, match="scores: got 1 for 2 latents"):
        LatentSet((1, 2), scores=(0.5,))
    with pytest.raises(ValueError, match="layer: got -1"):
        LatentSet((1,), layer=-1)


def test_save_then_load_gives_the_same_set(tmp_path):
    latents = LatentSet((5, 2), (9,), name="causal", layer=3, sae="some/sae", scores=(3, 2.5, 1), metadata={"seed": 0})
    assert LatentSet.load(latents.save(tmp_path / "latents.json")) == latents
    assert [path.name for path in tmp_path.iterdir()] == ["latents.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = LatentSet((1,)).save(tmp_path / "latents.json")
    with pytest.raises(TypeError):
        LatentSet((2,), metadata={"not json": object()}).save(path)
    assert LatentSet.load(path).positive == (1,)
    assert [entry.name for entry in tmp_path.iterdir()] == ["latents.json"]


def test_files_of_the_papers_scripts_are_read_and_extra_keys_kept(tmp_path):
    path = tmp_path / "latents.json"
    path.write_text(json.dumps({"K_pos": [4, 7], "K_neg": [1], "sae_id": "x"}))
    latents = LatentSet.load(path)
    assert latents.positive == (4, 7) and latents.negative == (1,) and latents.metadata == {"sae_id": "x"}
    path.write_text(json.dumps({"K_pos": [4]}))
    assert LatentSet.load(path).negative == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", 'neither "positive"'),
        ('{"indices": [1]}', 'neither "positive"'),
        ('{"positive": [], "negative": []}', "holds no latents"),
        ('{"K_pos": [1], "K_neg": [1]}', r"latents \[1\] are in both"),
        ('{"positive": ["a"]}', "expected integer"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        LatentSet.load(path)
    assert "bad.json" in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*absent.json"):
        LatentSet.load(tmp_path / "absent.json")


def test_take_follows_scores_and_keeps_the_order_within_a_sign():
    latents = LatentSet((10, 11, 12), (20, 21), scores=(1, 5, 3, 4, 2), name="causal", layer=2)
    best = latents.take(3)
    assert best.positive == (11, 12) and best.negative == (20,) and best.scores == (5, 3, 4)
    assert best.name == "causal" and best.layer == 2


def test_take_without_scores_follows_rank():
    latents = LatentSet((10, 11, 12), (20, 21))
    assert latents.take(3) == LatentSet((10, 11), (20,))
    with pytest.raises(ValueError, match="k: got 6, expected 1 to 5"):
        latents.take(6)


def test_union_keeps_this_sets_order_and_refuses_a_conflict():
    first, second = LatentSet((1, 2), (3,), scores=(3, 2, 1)), LatentSet((2, 4), (5,), scores=(9, 8, 7))
    both = first.union(second)
    assert both.positive == (1, 2, 4) and both.negative == (3, 5) and both.scores == (3, 2, 8, 1, 7)
    with pytest.raises(ValueError, match=r"latents \[3\] are in both"):
        first.union(LatentSet((3,)))
    with pytest.raises(ValueError, match="the sets differ in layer: 1 and 2"):
        LatentSet((1,), layer=1).union(LatentSet((2,), layer=2))


def test_one_side_of_a_set_and_its_signs_dealt_out_anew():
    latents = LatentSet((4, 2, 9), (7, 1), scores=(5, 4, 3, 2, 1), name="a", layer=3)
    up, down = latents.only("positive"), latents.only("negative")
    assert (up.positive, up.negative, up.scores) == ((4, 2, 9), (), (5, 4, 3))
    assert (down.positive, down.negative, down.layer) == ((), (7, 1), 3)
    for seed in range(5):
        dealt = latents.shuffled(seed)
        assert (len(dealt.positive), len(dealt.negative)) == (3, 2) and set(dealt.positive) != {4, 2, 9}
        assert dict(zip(dealt.indices.tolist(), dealt.scores, strict=True)) == {4: 5, 2: 4, 9: 3, 7: 2, 1: 1}
        assert dealt == latents.shuffled(seed)
    assert len({latents.shuffled(seed).positive for seed in range(10)}) > 1
    with pytest.raises(ValueError, match="side: the set has no negative latents"):
        up.only("negative")
    with pytest.raises(ValueError, match="shuffled: all latents of the set have one sign"):
        down.shuffled(0)
    with pytest.raises(ValueError, match="side: got 'both', expected positive or negative"):
        latents.only("both")
