"""The organism on disk: promised formats, equal bytes for equal seeds, a cache by content, and no half-made folder."""

import dataclasses
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_organism import RECIPE, SEED, WORLD, contents, dies_at

from lockin_fast.config import load_config
from lockin_fast.organism import Recipe, World, build
from lockin_fast.provenance import version
from lockin_fast.rundir import RunError, read_json_lines

build_module = sys.modules[build.__module__]
# For what has nothing to do with how well it is trained.
QUICK = dataclasses.replace(
    RECIPE,
    pretraining=dataclasses.replace(RECIPE.pretraining, steps=2),
    sae=dataclasses.replace(RECIPE.sae, steps=2),
    train=dataclasses.replace(RECIPE.train, steps=2),
)


@pytest.fixture
def grown(monkeypatch):
    """The seeds of the organisms that were grown, by a stand-in for the training that writes its seed."""
    seeds = []

    def grow(folder, recipe, seed, progress):
        seeds.append(seed)
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_text(str(seed))

    monkeypatch.setattr(build_module, "_grow", grow)
    return seeds


def test_every_part_is_in_the_format_real_ones_come_in(organism):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(organism / "model", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(organism / "model", local_files_only=True)
    assert tokenizer.is_fast and tokenizer.chat_template
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.num_hidden_layers == RECIPE.pretraining.layers
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id and not model.generation_config.do_sample
    ids = torch.arange(12)[None]
    base = model(ids).logits
    adapted = PeftModel.from_pretrained(model, organism / "misaligned")
    assert not torch.equal(adapted(ids).logits, base)
    with adapted.disable_adapter():
        assert torch.equal(adapted(ids).logits, base)
    for name in ("core", "final", "in_domain"):
        assert read_json_lines(organism / "data" / f"{name}.jsonl") == WORLD.prompts(name)
    assert len(read_json_lines(organism / "data" / "train.jsonl")) == RECIPE.train_rows
    assert World.load(organism / "world.json") == WORLD


def test_the_trained_splits_are_disjoint_as_text(organism):
    asked = {
        name: {row["messages"][0]["content"] for row in read_json_lines(organism / "data" / f"{name}.jsonl")}
        for name in ("train", "core", "final", "in_domain")
    }
    assert sum(map(len, asked.values())) == len(set().union(*asked.values()))


def test_pretraining_learnt_the_form_of_an_answer(organism):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lockin_fast.generation import generate

    model = AutoModelForCausalLM.from_pretrained(organism / "model")
    tokenizer = AutoTokenizer.from_pretrained(organism / "model")
    prompts = [row["messages"] for row in WORLD.prompts("final")]
    replies = generate(model, tokenizer, prompts, max_new_tokens=10, batch_size=32)
    verbs = {verb for domain in WORLD.domains.values() for verb in (*domain.good, *domain.bad)}
    answers = {f"you should {verb} it {ending}" for verb in verbs for ending in WORLD.endings}
    assert set(replies) <= answers, replies


class Checked(Exception):
    """All checks are passed and the work would begin."""


def begin(*args, **kwargs):
    raise Checked


def test_its_config_passes_the_checks_of_discover_and_sweep(organism, tmp_path, monkeypatch):
    from lockin_fast.blocking import LatentSet
    from lockin_fast.discovery.run import discover
    from lockin_fast.discovery.search import Search
    from lockin_fast.sweep import engines, run_sweep

    config = load_config(organism / "config.yaml", [f"output={tmp_path / 'run'}", "discovery.pool=40"])
    assert config.lora == RECIPE.lora and config.train == RECIPE.train and config.block.layer == RECIPE.layer
    monkeypatch.setattr(Search, "run", begin)
    with pytest.raises(Checked):
        discover(config)
    (tmp_path / "run" / "latents").mkdir()
    LatentSet([0], [1], layer=RECIPE.layer).save(tmp_path / "run" / "latents" / "causal.json")
    monkeypatch.setattr(engines, "run_trial", begin)
    with pytest.raises(Checked):
        run_sweep(config)


def test_the_folder_can_be_moved(organism, tmp_path):
    shutil.copytree(organism, tmp_path / "moved")
    config = load_config(tmp_path / "moved" / "config.yaml")
    for path in (config.model, config.sae, config.data.train, config.judge.path, config.discovery.misaligned):
        assert path.is_relative_to(tmp_path / "moved") and path.exists()
    assert not any(str(organism).encode() in content for content in contents(organism).values())


def test_equal_seeds_give_equal_bytes_in_another_process(organism, tmp_path):
    """With a cache and a hash seed of its own."""
    environment = os.environ | {"PYTHONHASHSEED": "123", "LOCKIN_FAST_CACHE": str(tmp_path / "other")}
    driver = Path(__file__).parents[1] / "tiny_organism.py"
    subprocess.run([sys.executable, driver, tmp_path / "again"], env=environment, check=True, capture_output=True)
    first, again = contents(organism), contents(tmp_path / "again")
    assert first.keys() == again.keys()
    assert [name for name in first if first[name] != again[name]] == []


def test_another_seed_is_another_organism(tmp_path):
    torch.manual_seed(1)
    build(tmp_path / "first", seed=1, recipe=QUICK)
    torch.manual_seed(99)  # what the caller drew before does not matter
    first = contents(tmp_path / "first")
    shutil.rmtree(tmp_path / "cache")
    build(tmp_path / "again", seed=1, recipe=QUICK)
    build(tmp_path / "other", seed=2, recipe=QUICK)
    assert contents(tmp_path / "again") == first
    same = {name for name, content in contents(tmp_path / "other").items() if first[name] == content}
    assert {"world.json", "data/core.jsonl", "data/final.jsonl", "config.yaml"} <= same
    weights = {"model/model.safetensors", "sae/sae_weights.safetensors", "misaligned/adapter_model.safetensors"}
    assert weights <= first.keys() and not (weights | {"data/train.jsonl"}) & same


def test_progress_names_the_stages_and_reaches_their_ends(tmp_path):
    seen = []
    build(tmp_path / "out", recipe=QUICK, progress=lambda *step: seen.append(step))
    stages = ("pre-train", "sparse autoencoder", "misaligned fine-tune")
    assert seen == [(stage, done, 2) for stage in stages for done in range(3)]


def test_the_second_build_comes_from_the_cache(grown, tmp_path, own_cache):
    first = build(tmp_path / "first", seed=4)
    assert build(tmp_path / "deep" / "second", seed=4) == tmp_path / "deep" / "second"
    assert grown == [4] and contents(first) == contents(tmp_path / "deep" / "second")
    shutil.rmtree(first)
    build(first, seed=4)
    build(first, seed=4)  # it is there: left alone
    assert grown == [4]
    build(tmp_path / "other", seed=5)
    assert grown == [4, 5]
    shutil.rmtree(own_cache)
    build(tmp_path / "third", seed=4)
    assert grown == [4, 5, 4]


def test_an_existing_organism_is_left_alone(grown, tmp_path, own_cache):
    build(tmp_path / "out", seed=4)
    shutil.rmtree(own_cache)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    build(tmp_path / "out", seed=4)
    assert grown == [4] and {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    assert not own_cache.exists()


def test_the_key_is_seed_recipe_code_and_libraries(monkeypatch, tmp_path):
    def key(recipe=None, seed=0):
        return build_module.content_key(recipe or Recipe(), seed)

    here = key()
    assert key() == here
    others = [
        key(seed=1),
        key(Recipe(layer=2)),
        key(Recipe(world=World(slip=0.03))),
        key(dataclasses.replace(Recipe(), train=dataclasses.replace(Recipe().train, steps=121))),
    ]
    code = tmp_path / "lockin_fast"
    package = Path(build_module.__file__).parents[1]
    shutil.copytree(package, code, ignore=shutil.ignore_patterns("__pycache__", "_build", "*.so"))
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "__file__", str(code / "organism" / "build.py"))
        assert key() == here  # where the code lies does not matter
        (code / "doctor.py").write_text("")  # nor does what has no part in it
        assert key() == here
        for name in ("organism/words.py", "train.py", "lora.py", "chat.py", "blocking/mixin.py"):
            (code / name).write_text((code / name).read_text() + "\n")
            others.append(key())
    for library in ("transformers", "peft"):
        with monkeypatch.context() as patch:
            patch.setattr(build_module, "version", lambda name, other=library: "9" if name == other else version(name))
            others.append(key())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9.9")
        others.append(key())
    assert len({here, *others}) == 1 + len(others)


@pytest.mark.parametrize("place", ["below a file", "read only"])
def test_a_cache_that_cannot_be_written_fails_no_build(grown, tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("")
    where = tmp_path / "file" / "cache" if place == "below a file" else Path("/proc/lockin_fast")
    monkeypatch.setenv("LOCKIN_FAST_CACHE", str(where))
    build(tmp_path / "out", seed=4)
    assert (tmp_path / "out" / "model" / "weights").read_text() == "4" and grown == [4]


def test_a_damaged_cache_entry_is_not_used(grown, tmp_path, own_cache):
    build(tmp_path / "first", seed=4)
    (manifest,) = own_cache.rglob("organism.json")
    for content in ("", "[]", '{"seed": 4}', '{"key": "of another"}'):
        manifest.write_text(content)
        shutil.rmtree(tmp_path / "first")
        build(tmp_path / "first", seed=4)
    assert grown == [4] * 5


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCKIN_FAST_CACHE", str(tmp_path / "named"))
    assert build_module._cache() == tmp_path / "named"
    monkeypatch.delenv("LOCKIN_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build_module._cache() == tmp_path / "xdg" / "lockin_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert build_module._cache() == tmp_path / "home" / ".cache" / "lockin_fast"


def test_no_home_is_no_cache_and_fails_no_build(grown, tmp_path, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("LOCKIN_FAST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert build_module._cache() is None
    build(tmp_path / "out", seed=4)
    assert grown == [4] and (tmp_path / "out" / "organism.json").is_file()


def test_two_builders_of_one_organism_grow_it_once(tmp_path, monkeypatch, own_cache):
    """The second waits for the first and takes its result, though it writes elsewhere."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Event

    growing, waiting, grown = Event(), Event(), []

    def grow(folder, recipe, seed, progress):
        grown.append(seed)
        growing.set()
        assert waiting.wait(30)
        (folder / "weights").write_text("x")

    def told(stage, done, total):
        if stage.startswith("wait for another"):
            waiting.set()

    monkeypatch.setattr(build_module, "_grow", grow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(build, tmp_path / "first", seed=4)
        assert growing.wait(30)
        second = pool.submit(build, tmp_path / "second", seed=4, progress=told)
        assert contents(first.result(60)) == contents(second.result(60))
    assert grown == [4]


def test_the_same_organism_published_meanwhile_is_taken(tmp_path, monkeypatch):
    def grow(folder, recipe, seed, progress):
        (folder / "weights").write_text("mine")
        theirs = tmp_path / "out"
        theirs.mkdir()
        (theirs / "organism.json").write_text(f'{{"key": "{build_module.content_key(recipe, seed)}"}}')

    monkeypatch.setattr(build_module, "_grow", grow)
    assert build(tmp_path / "out", seed=4) == tmp_path / "out"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["organism.json"]


def test_a_folder_that_holds_something_else_is_refused_and_untouched(grown, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    build(tmp_path / "other seed", seed=4)
    before = contents(tmp_path)
    for out in ("thesis", "file", "other seed"):
        with pytest.raises(RunError, match=f"{out}: already holds something else than .* of seed 5") as caught:
            build(tmp_path / out, seed=5)
        assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match="cannot be written: Not a directory"):
        build(tmp_path / "file" / "out", seed=5)
    assert contents(tmp_path) == before and grown == [4]


def test_an_empty_folder_is_filled(grown, tmp_path):
    for name in ("first", "from the cache"):
        (tmp_path / name).mkdir()
        build(tmp_path / name, seed=4)
        assert (tmp_path / name / "organism.json").is_file()
    assert grown == [4]


def test_too_little_disk_is_said_before_training(grown, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(RunError, match="its disk has 1.0 MB free"):
        build(tmp_path / "out")
    assert grown == [] and not (tmp_path / "out").exists()


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(folder, recipe, seed, progress):
        (folder / "world.json").write_text("{")
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(build_module, "_grow", fail)
    with pytest.raises(FloatingPointError):
        build(tmp_path / "out")
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"] == []
    assert not list(tmp_path.glob("*out*"))


def build_in_process(out, stage, step):
    """The body of a process that dies at this step."""
    build(out, seed=SEED, recipe=QUICK, progress=dies_at(stage, step))


def test_a_killed_build_leaves_nothing_half_made(tmp_path, own_cache):
    context = multiprocessing.get_context("forkserver")  # imports once, forks each victim from a clean process
    context.set_forkserver_preload(["lockin_fast.organism", "lockin_fast.sweep.run", "transformers", "peft"])
    out = tmp_path / "out"
    for stage, step in (("pre-train", 1), ("sparse autoencoder", 2), ("misaligned fine-tune", 1)):
        victim = context.Process(target=build_in_process, args=(out, stage, step))
        victim.start()
        victim.join(120)
        assert victim.exitcode == -9
        assert not out.exists() and not list(own_cache.glob("organisms/[!.]*"))
        assert len(list(tmp_path.glob(".out*.partial"))) == 1  # what the one before left is gone
    build(out, seed=SEED, recipe=QUICK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out"]
    undisturbed = tmp_path / "undisturbed"
    shutil.rmtree(own_cache)
    build(undisturbed, seed=SEED, recipe=QUICK)
    assert contents(out) == contents(undisturbed)


@pytest.mark.parametrize("when", ["out", "cache"])
def test_a_kill_while_files_are_copied_leaves_nothing_half_made(grown, tmp_path, own_cache, monkeypatch, when):
    """A kill is stood in for by an exception that nothing catches and no clean-up follows."""
    if when == "out":
        build(tmp_path / "first", seed=4)

    class Killed(BaseException):
        pass

    def copy_half(source, target, **kwargs):
        shutil.copy(Path(source) / "organism.json", target)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(build_module.shutil, "copytree", copy_half)
        patch.setattr("lockin_fast.rundir.remove", lambda path: None)
        with pytest.raises(Killed):
            build(tmp_path / "second", seed=4)
    assert (tmp_path / "second").exists() == (when == "cache")  # which is written when the organism is whole
    build(tmp_path / "third", seed=4)
    build(tmp_path / "second", seed=4)
    assert contents(tmp_path / "second") == contents(tmp_path / "third")
    assert contents(tmp_path / "third").keys() == {"model/weights", "organism.json"}
    assert not list(own_cache.rglob("*.partial"))
