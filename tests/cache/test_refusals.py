"""What does not fit a cache is refused early, in one line that names it."""

import json
import pickle
import shutil
from dataclasses import replace

import pytest
import tiny_llama as tiny
import torch
from cached_training import LAYER, SETTINGS, adapted, trainer

from lockin_fast.blocking import LatentSet
from lockin_fast.blocking.fingerprint import check_cache, model_key
from lockin_fast.blocking.write_cache import CacheSource, write_hidden_states, write_latents
from lockin_fast.cache import CacheError, open_cache
from lockin_fast.cache.collate import check_rows
from lockin_fast.cache.noise import MAX_SPURIOUS_LOSS, NoiseFloor
from lockin_fast.chat import ChatDataset


@pytest.fixture
def copy(caches, tmp_path):
    """A cache that may be harmed."""
    return shutil.copytree(caches(), tmp_path / "copy")


def shard(folder):
    return sorted(folder.glob("shard-*"))[1]


def test_a_truncated_shard(copy):
    path = shard(copy)
    path.write_bytes(path.read_bytes()[:-4])
    for verify in (True, False):
        with pytest.raises(CacheError, match=r"shard-00001.* is damaged.*run `lockin-fast cache` again"):
            open_cache(copy, verify=verify)


@pytest.mark.parametrize("place", [0, 3, 40, -1, "noise"])
def test_a_flipped_byte(copy, place):
    path = next(copy.glob("noise*")) if place == "noise" else shard(copy)
    content = bytearray(path.read_bytes())
    content[-1 if place == "noise" else place] ^= 16
    path.write_bytes(content)
    with pytest.raises(CacheError, match=r"(shard-00001|noise).* is damaged"):
        open_cache(copy)


def test_a_missing_shard_and_what_is_no_cache(copy, tmp_path):
    shard(copy).unlink()
    with pytest.raises(CacheError, match=r"not complete: 1 of \d+ files are missing \(shard-00001, "):
        open_cache(copy)
    with pytest.raises(CacheError, match="holds no cache; write one first: lockin-fast cache CONFIG"):
        open_cache(tmp_path)
    (copy / "manifest.json").write_text('{"sweep": {}}')
    with pytest.raises(CacheError, match="is not the manifest of a cache"):
        open_cache(copy)
    (copy / "manifest.json").write_text('{"cache_format": 99}')
    with pytest.raises(CacheError, match="has format 99, this version reads 2; write the cache again"):
        open_cache(copy)


def test_a_folder_with_other_files_or_another_cache_is_left_alone(copy, tmp_path, rows):
    before = {path.name for path in copy.iterdir()}
    with pytest.raises(CacheError, match="was written for another layer: there it is 1, here 0; give another folder"):
        source = CacheSource(tiny.model(), 0, rows, "all")
        write_latents(copy, source, tiny.sae(), range(tiny.LATENTS), settings=SETTINGS)
    with pytest.raises(CacheError, match="was written for another kind: there it is 'latents'"):
        write_hidden_states(copy, CacheSource(tiny.model(), LAYER, rows), blocksize=16, settings=SETTINGS)
    with pytest.raises(CacheError, match="another text, tokenizer, chat template or max_length .text.: there"):
        source = CacheSource(tiny.model(), LAYER, list(rows)[:5], "all")
        write_latents(copy, source, tiny.sae(), range(tiny.LATENTS), settings=SETTINGS)
    assert {path.name for path in copy.iterdir()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(CacheError, match="already holds thesis.tex and is no cache"):
        write_latents(tmp_path / "mine", CacheSource(tiny.model(), LAYER, rows), tiny.sae(), [1])


def test_another_model_is_named_before_training(tmp_path, caches, rows):
    penalty = tiny.penalty(reference=open_cache(caches()))
    other = tiny.model()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[5, 6] += 1e-3
    with pytest.raises(CacheError, match=r"another model \(model.model.layers.1.mlp.up_proj.weight\)"):
        trainer(tmp_path, other, rows, penalty)
    above = tiny.model()
    with torch.no_grad():
        above.model.layers[2].mlp.up_proj.weight.zero_()
        above.lm_head.weight.zero_()
    check_cache(penalty.reference, above, LAYER)  # what lies above the layer does not change its output
    with pytest.raises(CacheError, match=r"another model \(model.model.embed_tokens.weight\)"):
        check_cache(penalty.reference, tiny.model(dtype=torch.bfloat16), LAYER)
    with pytest.raises(CacheError, match="another autocast: there it is 'no', here 'bf16'"):
        trainer(tmp_path, adapted(), rows, penalty, bf16=True)


@pytest.mark.parametrize(
    ("setting", "value"), [("rms_norm_eps", 1e-3), ("hidden_act", "gelu"), ("use_cache", None)]
)
def test_the_same_weights_computed_with_otherwise_are_another_model(caches, setting, value):
    """By whatever the configuration sets, but for what changes no hidden state."""
    cache = open_cache(caches())
    if value is None:
        check_cache(cache, tiny.model(use_cache=False, attention_dropout=0.1), LAYER)
        return
    with pytest.raises(CacheError, match=rf"written for another model \(config.{setting}\): there it is .*, here"):
        check_cache(cache, tiny.model(**{setting: value}), LAYER)


def test_the_same_weights_under_another_rotary_embedding_are_another_model(caches):
    other = tiny.model(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    with pytest.raises(CacheError, match=r"another model \(config.rope_parameters.rope_theta\)"):
        check_cache(open_cache(caches()), other, LAYER)


def test_the_fingerprint_is_that_of_the_base_model(caches):
    key = model_key(tiny.model(), LAYER)
    assert key == model_key(adapted(), LAYER) == model_key(torch.nn.parallel.DataParallel(tiny.model()).module, LAYER)
    assert key["quantization"] == "none" and not any("layers.2" in name or "lm_head" in name for name in key["model"])
    rolled = tiny.model()
    with torch.no_grad():
        weight = rolled.model.layers[0].mlp.up_proj.weight
        weight.copy_(weight.roll(1))
    assert model_key(rolled, LAYER) != key, "a permutation of the same numbers"


def test_another_layer_latent_sae_or_kind_of_tokens(caches, tmp_path, rows):
    cache = open_cache(caches())
    with pytest.raises(CacheError, match="another layer: there it is 1, here 0"):
        tiny.penalty(layer=0, reference=cache)
    sae = tiny.sae()
    changed = replace(sae, bias=sae.bias + (torch.arange(tiny.LATENTS) == 40) * 1e-3)
    with pytest.raises(CacheError, match=r"another SAE \(sae.40\)"):
        tiny.BlockPenalty(changed, tiny.LATENT_SET, LAYER, 1.0, reference=cache)
    tiny.BlockPenalty(changed, LatentSet((3, 17)), LAYER, 1.0, reference=cache)  # it reads none of what differs
    write_latents(tmp_path / "pool", CacheSource(tiny.model(), LAYER, rows), tiny.sae(), [3, 17], settings=SETTINGS)
    pool = open_cache(tmp_path / "pool")
    with pytest.raises(CacheError, match="holds 2 latents, not latent 40; add its set to cache.latents"):
        tiny.penalty(reference=pool)
    with pytest.raises(CacheError, match="another penalised: there it is 'supervised', here 'all'"):
        tiny.penalty(latents=LatentSet((3,)), reference=pool, tokens="all")
    with pytest.raises(ValueError, match='expected "live", a frozen second model or an opened cache'):
        tiny.penalty(reference=caches())


def test_another_tokenizer_or_other_text_is_named_with_its_place(tmp_path, caches, rows):
    cache = open_cache(caches())
    check_rows(tiny.penalty(reference=cache).cached, rows, "all")
    other = ChatDataset(tiny.conversations(24), tiny.tokenizer(tiny.TEMPLATE.replace("<end>", "<x>")))
    with pytest.raises(CacheError, match="lacks row 0 of the dataset from position .* another tokenizer or chat templ"):
        check_rows(tiny.penalty(reference=cache).cached, other, "supervised")
    trained = trainer(tmp_path, adapted(), other, tiny.penalty(reference=cache))
    with pytest.raises(CacheError, match=r"lacks .* tokens of a batch; the first is token \d+ at row 0, position"):
        trained.train()


def test_noise_is_measured_and_refused(caches):
    exact = torch.tensor([[1.0, 0.0, 0.0], [3.0, 0.0, 2.0], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    stored = torch.tensor([[1.1, 0.0, 0.0], [2.7, 0.0, 2.0], [5.0, 0.0, 0.2], [0.0, 0.0, 0.0]])
    floor = NoiseFloor(exact, stored)
    assert floor.share.tolist() == [0.75, 0.0, 0.5]
    assert floor.sigma.tolist() == pytest.approx([(0.1 / 3) ** 0.5, 0.0, (0.04 / 2) ** 0.5])
    assert floor.spurious_loss() == pytest.approx(float((floor.share * floor.sigma**2).sum() / 2))
    assert floor.spurious_loss(torch.tensor([0.2, 0.0, 1.0])) == pytest.approx(0.1**2 / 4 / 2, rel=1e-5)
    assert floor.margin.tolist() == pytest.approx([4 * float(s) for s in floor.sigma])

    cache = open_cache(caches("hidden_states"))
    loss = tiny.penalty(1.0, reference=cache).cached.noise().spurious_loss() * cache.manifest["tokens_per_target"]
    limit = MAX_SPURIOUS_LOSS / loss
    tiny.penalty(0.99 * limit, reference=cache)
    with pytest.raises(ValueError, match='reference: the noise of the cache alone would cost .* use margin="noise"'):
        tiny.penalty(1.01 * limit, reference=cache)
    tiny.penalty(1.01 * limit * len(tiny.LATENT_SET) * 0.9, reference=cache, latent_reduction="mean")
    penalty = tiny.penalty(1.01 * limit, reference=cache, margin="noise")
    assert penalty.rows(torch.float32, "cpu").margin.equal(penalty.cached.noise().margin)
    with pytest.raises(ValueError, match="would cost .* use a larger margin"):
        tiny.penalty(1e9 * limit, reference=cache, margin=1e-6)
    tiny.penalty(13e3, reference=open_cache(caches()))  # exact latents pass
    with pytest.raises(ValueError, match="margin: got 'noise', but only a reference that is a cache"):
        tiny.penalty(margin="noise")


def test_a_cache_survives_pickling(caches):
    cache = open_cache(caches())
    again = pickle.loads(pickle.dumps(cache))
    place = again.find(cache._keys[:7])
    assert again.path == cache.path and again.gather("z", place).equal(cache.gather("z", cache.find(cache._keys[:7])))
    assert "tokens, layer 1, float32" in repr(cache)
    assert json.loads((cache.path / "manifest.json").read_text())["tokens"] == len(cache)
