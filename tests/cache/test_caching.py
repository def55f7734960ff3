"""`lockin-fast cache CONFIG`, and train and sweep against what it wrote."""

import dataclasses
import json

import pytest

from lockin_fast import cli
from lockin_fast.cache import CacheError, open_cache
from lockin_fast.caching import run_cache
from lockin_fast.config import ConfigError, load_config
from lockin_fast.rundir import RunError
from lockin_fast.sweep import run_sweep
from lockin_fast.sweep.single import run_training

CACHED = ("block.reference=cache", "cache.path=latents-cache")
BLOCKED = ("block.latents=latents/causal.json", "block.weight=100")


pytestmark = pytest.mark.usefixtures("vowel_judge")


@pytest.fixture(scope="module")
def written(world):
    return run_cache(load_config(world, ["cache.path=latents-cache", "block.latents=latents/causal.json"]))


def test_one_cache_holds_the_union_of_all_sets(world, written):
    cache = open_cache(written["cache"])
    assert cache.latents == [1, 2, 5, 9, 30, 31, 40, 41] and cache.layer == 1
    assert [row["latents"] for row in written["sets"]] == ["causal", "random", "block.latents"]
    assert written["tokens"] == len(cache) and written["bytes_per_token"] == 4 * 8 + 8  # with the key
    assert cache.manifest["penalised"] == "supervised"
    again = run_cache(load_config(world, ["cache.path=latents-cache", "block.latents=latents/causal.json"]))
    assert again == written


def test_training_with_it_is_training_live(world, written):
    live = run_training(load_config(world, [*BLOCKED, "output=live"]))
    cached = run_training(load_config(world, [*BLOCKED, *CACHED, "output=cached"]))
    for name in ("sft_loss", "penalty", "active_fraction"):
        assert cached[name] == pytest.approx(live[name], rel=1e-6) and live[name] > 0


def test_a_sweep_reads_one_cache_for_all_of_its_sets(world, written):
    run_sweep(load_config(world, [*CACHED, "sweep.seeds=[0]", "sweep.lambdas=[100]", "output=swept"]))
    trials = {path.name for path in (world.parent / "swept" / "trials").iterdir()}
    assert trials >= {"causal-lambda100-seed0", "random-lambda100-seed0"}
    manifest = json.loads((world.parent / "swept" / "manifest.json").read_text())
    assert manifest["sweep"]["config"]["block.reference"] == "cache"


def test_a_pool_of_files_and_hidden_states(world):
    pool = "cache.latents=[latents/causal.json, latents/random.json]"
    assert run_cache(load_config(world, ["cache.path=pool", pool]))["sets"][1]["latents"] == "random"
    four_bits = ["cache.kind=hidden_states", "cache.path=four-bits", "cache.blocksize=16", "cache.outliers=1"]
    summary = run_cache(load_config(world, four_bits))
    assert summary["kind"] == "hidden states" and 0 < summary["sets"][0]["largest_lambda"] < 1
    config = load_config(world, [*BLOCKED, "block.reference=cache", "cache.path=four-bits", "output=noisy"])
    with pytest.raises(ConfigError, match="^block.reference: the noise of the cache alone would cost a loss"):
        run_training(config)
    with pytest.raises(ConfigError, match="^block.reference: the noise of the cache alone would cost a loss"):
        run_sweep(load_config(world, ["block.reference=cache", "cache.path=four-bits", "output=noisy"]))
    with pytest.raises(ConfigError, match="would cost .* use a larger margin"):
        run_training(dataclasses.replace(config, block=dataclasses.replace(config.block, margin="noise")))
    quiet = dataclasses.replace(config.block, margin="noise", weight=1.0)
    result = run_training(dataclasses.replace(config, block=quiet, output=world.parent / "quiet"))
    assert 0 <= result["penalty"] < 1e-2
    assert not (world.parent / "noisy").exists()


def test_a_4_bit_model_has_a_cache_of_its_own(world, written):
    pytest.importorskip("bitsandbytes")
    quantised = [*BLOCKED, "quantization=nf4", "cache.path=nf4-cache"]
    run_cache(load_config(world, quantised))
    live = run_training(load_config(world, [*quantised, "output=nf4-live"]))
    cached = run_training(load_config(world, [*quantised, "output=nf4-cached", "block.reference=cache"]))
    assert cached["penalty"] == pytest.approx(live["penalty"], rel=1e-6) and live["penalty"] > 0
    mixed = [*quantised, *CACHED, "output=refused"]
    with pytest.raises(ConfigError, match="written for another quantization: there it is 'none', here 'nf4'"):
        run_training(load_config(world, mixed))


def test_8_bit_products_that_depend_on_the_batch_are_noise_and_refused(world):
    """LLM.int8 takes the channels with outliers anywhere in the batch out of its 8 bits."""
    pytest.importorskip("bitsandbytes")
    quantised = [*BLOCKED, "quantization=int8", "cache.path=int8-cache"]
    assert run_cache(load_config(world, quantised))["sets"][0]["sigma_max"] > 0.01
    with pytest.raises(ConfigError, match="^block.reference: the noise of the cache alone would cost"):
        run_training(load_config(world, [*quantised, "block.reference=cache", "output=refused"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["cache.path=nowhere"], "^cache.path: /.*nowhere holds no cache; write one first: lockin-fast cache"),
        ([], "cache.path: missing, and this command needs it"),
        (["cache.path=latents-cache", "train.bf16=true"], "cache.path: .*written for another autocast"),
        (["cache.path=latents-cache", "block.layer=0"], "latents .*written for another layer: there it is 1, here 0"),
        (["cache.path=latents-cache", "block.tokens=all"], "latents .*written for another penalised"),
        (["cache.path=latents-cache", "data.train=data/other.jsonl"], "cache.path: .*lacks row 1 of the dataset"),
        (["cache.path=latents-cache", "model=other"], "cache.path: .*another model [(]model[.].*[)]: there it is"),
        (["cache.path=latents-cache", "block.margin=-1"], "block.margin: expected 0 or more, got -1"),
    ],
)
def test_what_it_was_not_written_for_is_refused_before_training(world, written, settings, message):
    folder = world.parent
    row = json.loads((folder / "data" / "train.jsonl").read_text().splitlines()[0])
    other = {"messages": [{"role": "user", "content": "ask sky sky"}, {"role": "assistant", "content": "feed red"}]}
    (folder / "data" / "other.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(other)}\n")
    if not (folder / "other").exists():
        another_model(folder)
    overrides = [*BLOCKED, "block.reference=cache", "output=refused", *settings]
    with pytest.raises(ConfigError, match=message):
        run_training(load_config(world, overrides))
    assert not (folder / "refused").exists()


def another_model(folder):
    """The world's model with one weight changed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    model.save_pretrained(folder / "other")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "other")


def test_what_cannot_be_cached_is_refused(world, written, tmp_path):
    alone = ["sweep.latents={}", "output=empty", "cache.path=new"]
    with pytest.raises(ConfigError, match="cache.latents: no latent set to cache"):
        run_cache(load_config(world, alone))
    with pytest.raises(ConfigError, match="cache.path: missing"):
        run_cache(load_config(world))
    with pytest.raises(CacheError, match="latents-cache was written for another autocast"):
        run_cache(load_config(world, ["cache.path=latents-cache", "train.bf16=true"]))
    with pytest.raises(CacheError, match="already holds causal.json and is no cache"):
        run_cache(load_config(world, ["cache.path=latents"]))
    with pytest.raises(RunError, match="config.yaml is a file; give a folder"):
        run_cache(load_config(world, ["cache.path=config.yaml"]))
    assert not (world.parent / "new").exists()


def test_a_process_that_is_done_first_says_so(world, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = load_config(world, ["cache.path=shared", "cache.shard_tokens=20"])
    assert "written by process 1 of 2; cache: " in run_cache(config)["share"]
    monkeypatch.setenv("RANK", "0")
    assert run_cache(config)["files"] > 2


def test_the_command_shows_what_it_wrote(world, written, capsys):
    status = cli.main(["cache", str(world), "--set", "cache.path=shown"])
    out = capsys.readouterr().out
    assert status == 0 and "tokens" in out and "lambda up to" in out and "causal" in out
    assert f"next: lockin-fast sweep {world} --set cache.path=shown --set block.reference=cache\n" in out
    assert cli.main(["cache", str(world)]) == 1
    assert "error: cache.path: missing" in capsys.readouterr().err
