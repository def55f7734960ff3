"""Writing a cache: what is in it, by whom, and after what."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_llama as tiny
import torch
from cached_training import LAYER, SETTINGS
from peft import LoraConfig, get_peft_model

from lockin_fast.blocking.write_cache import CacheSource, WriteSettings, write_hidden_states, write_latents
from lockin_fast.cache import CacheError, open_cache
from lockin_fast.cache.files import write_item
from lockin_fast.cache.keys import token_keys
from lockin_fast.cache.plan import make_plan

ROOT = Path(__file__).parents[2]
EPS = torch.finfo(torch.float32).eps


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def hidden(model, ids):
    """The layer's output of one document, as transformers gives it."""
    with torch.no_grad():
        return model(input_ids=ids[None], output_hidden_states=True).hidden_states[LAYER + 1][0]


def test_every_token_is_stored_once_with_its_latents(caches, rows):
    cache, model, sae = open_cache(caches()), tiny.model().eval(), tiny.sae()
    prefixes = {tuple(row["input_ids"][: i + 1].tolist()) for row in rows for i in range(len(row["input_ids"]))}
    assert len(cache) == len(prefixes) < sum(len(row["input_ids"]) for row in rows)
    for row in rows:
        z = cache.gather("z", cache.find(token_keys(row["input_ids"][None])[0]))
        exact = sae.encode_latents(hidden(model, row["input_ids"]))
        # Another batching adds the same products in another order, at most an ulp of their sizes a product and layer.
        assert (z - exact).abs().max() <= tiny.WIDTH * EPS * exact.abs().max()


def test_a_cache_of_four_bits_is_that_of_the_hidden_states(caches, rows):
    cache, model, row = open_cache(caches("hidden_states")), tiny.model().eval(), rows[3]["input_ids"]
    stored = cache.hidden_states(row[None])
    exact = hidden(model, row)
    assert stored.shape == (1, *exact.shape) and stored.outliers.shape[1] == 2
    assert torch.allclose(stored.outliers, exact[:, stored.channels.long()], rtol=0, atol=1e-5 * exact.abs().max())
    # NF4's codes lie at most 0.152 of a block's largest element from what they stand for.
    assert (stored.dequantize()[0] - exact).abs().max() <= 0.153 * exact.abs().max()
    masked = cache.hidden_states(row[None], torch.arange(len(row))[None] < 3).dequantize()
    assert masked[0, 3:].eq(0).all() and masked[0, :3].equal(stored.dequantize()[0, :3])


def test_only_supervised_tokens_are_stored_and_rows_end_at_their_last():
    rows = [
        {"input_ids": torch.tensor([1, 2, 3, 4, 5]), "labels": torch.tensor([-100, -100, 3, -100, -100])},
        {"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([-100, 2, 3])},
        {"input_ids": torch.tensor([6, 7]), "labels": torch.tensor([-100, -100])},
    ]
    plan = make_plan(rows, "supervised", 1)
    assert plan.row.tolist() == [0, 1] and plan.position.tolist() == [2, 1]  # row 1's last token is row 0's third
    assert plan.shards == ((0, 1), (1, 2)) and [len(plan.work(i)[0].input_ids) for i in (0, 1)] == [3, 2]
    assert plan.tokens_per_target == pytest.approx(3 / 3)
    everything = make_plan([{"input_ids": row["input_ids"]} for row in rows], "all", 100)
    assert len(everything) == 7 and everything.shards == ((0, 7),)
    assert make_plan(rows, "all", 1).tokens_per_target == pytest.approx(10 / 3)
    assert plan.digest != everything.digest == make_plan(rows, "all", 2).digest


def test_the_sample_is_spread_over_the_rows(rows):
    plan = make_plan(rows, "supervised", 1000)
    chosen = [work.row for work in plan.sample(60)]
    assert chosen[0] == 0 and chosen[-1] == len(rows) - 1 and 3 < len(chosen) < len(rows)
    assert sum(len(work.keys) for work in plan.sample(10**9)) == len(plan)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"input_ids": torch.ones(2)}], {}, "row 0 has .'input_ids'., expected input_ids and labels"),
        ([{"input_ids": torch.ones(2), "labels": torch.full((2,), -100)}], {}, "none of its 1 rows has a supervised"),
        ([], {}, "none of its 0 rows"),
        ([], {"tokens": "some"}, "tokens: got 'some'"),
        ([], {"shard_tokens": 0}, "shard_tokens: got 0"),
    ],
)
def test_data_that_cannot_be_cached_is_refused(rows, options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(rows, **{"tokens": "supervised", "shard_tokens": 10, **options})


def test_two_ranks_write_the_cache_of_one(tmp_path, rows):
    for rank in (1, 0):
        if rank == 0:
            with pytest.raises(CacheError, match="is not complete: .* files are missing .*goes on where it stood"):
                open_cache(tmp_path / "two")
        settings = WriteSettings(batch_size=4, shard_tokens=60, rank=rank, world=2)
        write_latents(tmp_path / "two", CacheSource(tiny.model(), LAYER, rows), tiny.sae(), [3, 5], settings=settings)
    write_latents(tmp_path / "one", CacheSource(tiny.model(), LAYER, rows), tiny.sae(), [5, 3], settings=SETTINGS)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert open_cache(tmp_path / "two").latents == [3, 5]


def test_the_rank_is_torchruns(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert WriteSettings().place == (2, 3) and WriteSettings(rank=0, world=1).place == (0, 1)
    with pytest.raises(ValueError, match="rank: got 5 of 3 processes"):
        WriteSettings(rank=5)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        WriteSettings(batch_size=0)


def test_adapters_are_off_and_everything_is_put_back(tmp_path, rows):
    model = get_peft_model(tiny.model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).train()
    write_latents(tmp_path / "adapted", CacheSource(model, LAYER, rows), tiny.sae(), [3, 5], settings=SETTINGS)
    write_latents(tmp_path / "base", CacheSource(tiny.model(), LAYER, rows), tiny.sae(), [3, 5], settings=SETTINGS)
    assert contents(tmp_path / "adapted") == contents(tmp_path / "base")
    assert model.training and not any(module._forward_hooks for module in model.modules())


def test_shards_on_disk_are_not_computed_again_and_damaged_ones_are(tmp_path, rows):
    folder, source = tmp_path / "cache", CacheSource(tiny.model(), LAYER, rows)
    done = []

    def progress(stage, tokens, total):
        done.append((tokens, total))

    write_latents(folder, source, tiny.sae(), [3, 5], settings=SETTINGS, progress=progress)
    assert done[0][0] == 0 and done[-1] == (done[-1][1],) * 2 and len(done) > 4
    whole = contents(folder)
    shards = sorted(folder.glob("shard-*"))
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    shards[0].unlink()
    flipped = bytearray(shards[2].read_bytes())
    flipped[-3] ^= 1
    shards[2].write_bytes(flipped)
    write_latents(folder, source, tiny.sae(), [3, 5], settings=SETTINGS)
    assert contents(folder) == whole
    kept = [path for path in times if path not in (shards[0], shards[2])]
    assert all(path.stat().st_mtime_ns == times[path] for path in kept) and len(kept) > 2


def test_shards_that_were_cut_otherwise_are_not_mixed(tmp_path, rows):
    """As many of them, but between other rows."""
    first, other = (make_plan(rows, "supervised", tokens).shards for tokens in (10, 18))
    assert len(first) == len(other) and first != other
    source = CacheSource(tiny.model(), LAYER, rows)
    write_latents(tmp_path, source, tiny.sae(), [3], settings=replace(SETTINGS, shard_tokens=10))
    with pytest.raises(CacheError, match="written for another shard_tokens: there it is 10, here 18; give another"):
        write_latents(tmp_path, source, tiny.sae(), [3], settings=replace(SETTINGS, shard_tokens=18))


@pytest.mark.parametrize("kind", ["latents", "hidden_states"])
@pytest.mark.parametrize("harm", ["missing", "damaged"])
def test_the_noise_is_written_anew_too(tmp_path, rows, kind, harm):
    folder, source = tmp_path / "cache", CacheSource(tiny.model(), LAYER, rows)

    def write():
        if kind == "latents":
            write_latents(folder, source, tiny.sae(), [3, 5], settings=SETTINGS)
        else:
            write_hidden_states(folder, source, outliers=2, blocksize=16, settings=SETTINGS)

    write()
    whole = contents(folder)
    noise = next(folder.glob("noise.*"))
    content = bytearray(noise.read_bytes())
    content[-1] ^= 16
    noise.unlink() if harm == "missing" else noise.write_bytes(content)
    with pytest.raises(CacheError, match="run `lockin-fast cache` again"):
        open_cache(folder)
    write()
    assert contents(folder) == whole


def test_what_a_kill_left_before_the_manifest_is_replaced_and_shards_without_one_refused(tmp_path, rows):
    whole, folder = tmp_path / "whole", tmp_path / "cache"
    source = CacheSource(tiny.model(), LAYER, rows)
    write_latents(whole, source, tiny.sae(), [3, 5], settings=SETTINGS)
    folder.mkdir()
    write_item(folder, "noise", {"exact": torch.zeros(1, 2), "stored": torch.ones(1, 2)})  # of some other model
    write_latents(folder, source, tiny.sae(), [3, 5], settings=SETTINGS)
    assert contents(folder) == contents(whole)
    (folder / "manifest.json").unlink()
    with pytest.raises(CacheError, match="already holds shard-00000.* and is no cache"):
        write_latents(folder, source, tiny.sae(), [3, 5], settings=SETTINGS)


def test_a_hidden_state_that_is_not_finite_is_named(tmp_path, rows):
    model = tiny.model()
    word = int(rows[5]["input_ids"][1])
    with torch.no_grad():
        model.get_input_embeddings().weight[word] = float("inf")
    first = next(i for i, row in enumerate(rows) if word in row["input_ids"])
    with pytest.raises(FloatingPointError, match=f"hidden state of row {first} of the dataset is not finite"):
        settings = WriteSettings(batch_size=1)
        write_latents(tmp_path / "cache", CacheSource(model, LAYER, rows), tiny.sae(), [3], settings=settings)
    assert not list(tmp_path.glob("cache/*.json"))


IN_A_PROCESS = """
import os, random, signal, sys, threading
from pathlib import Path
import torch
from lockin_fast.cache.latents import LatentContent
from lockin_fast.cache.plan import make_plan
from lockin_fast.cache.write import WriteSettings, write_cache
from lockin_fast.sae import SparseAutoencoder
torch.set_num_threads(1)
folder, call, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
make = torch.Generator().manual_seed(0)
lengths = torch.randint(1, 30, (200,), generator=make).tolist()
rows = [{"input_ids": torch.randint(50, (length,), generator=make)} for length in lengths]
table, weight = torch.randn(50, 16, generator=make), torch.randn(20, 16, generator=make)
sae = SparseAutoencoder(weight, torch.zeros(20), weight, torch.zeros(16), latents=torch.arange(20), width=20)
calls = 0

def hidden_state(ids, attention):
    global calls
    calls += 1
    if calls == call:
        os.kill(os.getpid(), signal.SIGKILL)
    return table[ids].cumsum(1)

if seconds:
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
write_cache(folder, make_plan(rows, "all", 100), hidden_state, LatentContent(sae), {"layer": 0, "dtype": "float32"},
            WriteSettings(batch_size=4, noise_tokens=100), lambda *done: None)
os._exit(0)
"""


def write_in_a_process(folder, *, call=0, seconds=0.0):
    command = [sys.executable, "-c", IN_A_PROCESS, str(folder), str(call), str(seconds)]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "cache"
    assert write_in_a_process(folder) == 0
    return contents(folder)


def test_killed_and_resumed_it_is_the_same_to_the_byte(tmp_path, undisturbed):
    folder = tmp_path / "cache"
    assert write_in_a_process(folder, call=40) == -signal.SIGKILL
    before = contents(folder)
    assert 2 < len(before) < len(undisturbed)
    assert write_in_a_process(folder) == 0
    assert contents(folder) == undisturbed and before.items() <= undisturbed.items()
    assert not list(folder.glob(".*.partial"))


@pytest.mark.slow  # 27 processes of three seconds each
def test_killed_at_many_moments_it_is_the_same_to_the_byte(tmp_path, undisturbed):
    random, number, midway = np.random.default_rng(0), 0, 0
    for _ in range(25):
        folder = tmp_path / str(number)
        status = write_in_a_process(folder, seconds=float(random.uniform(0.001, 0.1)))
        there = contents(folder) if folder.exists() else {}
        assert there.items() <= undisturbed.items(), "what is under its final name is not whole"
        if status == 0:
            assert there == undisturbed
            number += 1  # the next is killed from the start again
        else:
            assert status == -signal.SIGKILL
            midway += 0 < len(there) < len(undisturbed)
    assert write_in_a_process(folder) == 0 and contents(folder) == undisturbed
    assert midway > 6, "the kills came too early or too late to say anything"


def test_hidden_states_of_two_ranks_share_their_outlier_channels(tmp_path, rows):
    for rank in (0, 1):
        settings = WriteSettings(batch_size=4, shard_tokens=60, rank=rank, world=2)
        source = CacheSource(tiny.model(), LAYER, rows)
        write_hidden_states(tmp_path / "two", source, outliers=1, blocksize=32, settings=settings)
    cache = open_cache(tmp_path / "two")
    assert len(cache.manifest["channels"]) == 1 and cache.nbytes < 4 * tiny.WIDTH * len(cache)
    with pytest.raises(ValueError, match="blocksize: got 24 for a width of 32"):
        write_hidden_states(tmp_path / "bad", CacheSource(tiny.model(), LAYER, rows), blocksize=24)
    assert not (tmp_path / "bad").exists()
