"""discover(): what it writes, that it is the same every time and never done twice, and what it refuses."""

import json
import multiprocessing
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_organism import RECIPE, WORLD, contents, dies_at

from lockin_fast import judges
from lockin_fast.blocking import LatentSet
from lockin_fast.config import load_config
from lockin_fast.discovery import discover, rounds, steered
from lockin_fast.discovery.search import Search
from lockin_fast.discovery.shift import mean_shift
from lockin_fast.generation import generate
from lockin_fast.inputs import open_inputs, open_sae
from lockin_fast.lora import adapter

POOL, LATENTS, LAYER = 12, 6, RECIPE.layer
SETTINGS = [f"discovery.pool={POOL}", f"discovery.latents={LATENTS}", "discovery.prompts=8", "discovery.samples=8",
            "discovery.strengths=[1.0, 4.0]", "discovery.incoherence_budget=1.0", "train.steps=3",
            "generation.batch_size=64"]  # fmt: skip
STAGES = ["shift of every latent", "repair by steering", "induce by steering", "joint repair, round 1 of 2",
          "fine-tune with 3 latents blocked", "joint repair, round 2 of 2"]  # fmt: skip
SETS = ["causal", "top-delta", "random", "ind-pp"]
ANSWERED = 2 * 8 * (2 * POOL + 1)  # both sides, 8 prompts, two strengths of each latent and none
CALIBRATED = ["discovery.calibration=bisection", "discovery.calibration_strengths=[0.5, 1.0, 2.0]",
              "discovery.shortlist=4"]  # fmt: skip


def configured(organism, output, *overrides):
    return load_config(organism / "config.yaml", [*SETTINGS, f"output={output}", *overrides])


@pytest.fixture(scope="module")
def found(organism, tmp_path_factory):
    """A finished discovery: (configuration, paths by name, the stages in their order)."""
    config = configured(organism, tmp_path_factory.mktemp("found") / "run")
    stages = {}
    paths = discover(config, lambda stage, done, total: stages.setdefault(stage, None))
    return config, paths, list(stages)


@pytest.fixture
def no_search(monkeypatch):
    """Any search is a failure of the test."""

    def fail(self):
        raise AssertionError("the search started")

    monkeypatch.setattr(Search, "run", fail)


@pytest.fixture(scope="module")
def shift(found, organism):
    """The mean shift of every latent on the core prompts, answered by the base model."""
    config = found[0]
    inputs, sae = open_inputs(config, {}), open_sae(config)
    prompts = [row["messages"] for row in WORLD.prompts("core")]
    replies = generate(inputs.model, inputs.tokenizer, prompts, max_new_tokens=10, batch_size=64)
    told = [[*p, {"role": "assistant", "content": text}] for p, text in zip(prompts, replies, strict=True)]
    with adapter(inputs.model, organism / "misaligned") as adapted:
        return mean_shift(adapted, inputs.tokenizer, told, sae, LAYER)


def test_the_sets_are_of_the_promised_size(found):
    config, paths, _ = found
    assert list(paths) == SETS
    for name, path in paths.items():
        assert path == config.output / "latents" / f"{name}.json"
        latents = LatentSet.load(path)
        assert (latents.name, latents.layer, len(latents)) == (name, LAYER, LATENTS)
        assert len(set(latents.indices.tolist())) == LATENTS
        assert max(latents.indices.tolist()) < RECIPE.sae.width
        assert (latents.scores is None) == (name == "random")
    assert sorted(path.name for path in config.output.iterdir()) == [
        ".lock", "discovery", "discovery.json", "latents", "manifest.json",
    ]  # fmt: skip


def test_the_stages_come_in_order(found):
    assert [stage for stage in found[2] if stage in STAGES] == STAGES == found[2]


def test_top_delta_are_the_largest_shifts_in_their_direction(found, shift):
    latents = LatentSet.load(found[1]["top-delta"])
    largest = shift.abs().argsort(descending=True, stable=True)[:LATENTS].tolist()
    assert set(latents.indices.tolist()) == set(largest)
    assert latents.positive == tuple(k for k in largest if shift[k] > 0)
    assert latents.negative == tuple(k for k in largest if shift[k] < 0)
    expected = shift.abs()[latents.indices].tolist()
    assert latents.scores == pytest.approx(expected, rel=1e-9)


def test_random_latents_are_drawn_by_the_seed_from_the_whole_sae_and_signed_by_their_shift(found, shift):
    latents = LatentSet.load(found[1]["random"])
    drawn = torch.randperm(RECIPE.sae.width, generator=torch.Generator().manual_seed(found[0].discovery.seed))[:LATENTS]
    assert set(latents.indices.tolist()) == set(drawn.tolist())
    assert all(shift[k] >= 0 for k in latents.positive) and all(shift[k] < 0 for k in latents.negative)


def test_the_table_says_what_was_found_about_the_pool(found, shift):
    config, paths, _ = found
    table = json.loads((config.output / "discovery.json").read_text())
    pool = [row["latent"] for row in table["pool"]]
    assert pool == shift.abs().argsort(descending=True, stable=True)[:POOL].tolist()
    assert [row["shift"] for row in table["pool"]] == pytest.approx(shift[pool].tolist(), rel=1e-9)
    for row in table["pool"]:
        for what in ("induced", "repaired"):
            assert 0 <= row[what] <= 1 and (row[what] > 0) == (row[f"{what}_strength"] is not None)
            assert row[f"{what}_strength"] in (None, 1.0, 4.0)
    assert any(row["repaired"] > 0 for row in table["pool"])

    causal, latents = table["causal"], LatentSet.load(paths["causal"])
    first = causal[: LATENTS // 2]  # found on the misaligned model itself, among the latents that repaired it
    assert all(row["shift"] == pytest.approx(shift[row["latent"]].item(), rel=1e-9) for row in first)
    repairs = {row["latent"] for row in table["pool"] if row["repaired"] > 0}
    chosen = {row["latent"] for row in first}
    assert chosen <= repairs if len(repairs) >= len(first) else repairs <= chosen <= set(pool)
    assert latents.positive == tuple(row["latent"] for row in causal if row["shift"] >= 0)
    assert latents.negative == tuple(row["latent"] for row in causal if row["shift"] < 0)
    gains = {row["latent"]: row["gain"] for row in causal}
    assert latents.scores == pytest.approx([gains[k] for k in latents.indices.tolist()])


def test_indpp_are_the_best_of_the_screen(found):
    config, paths, _ = found
    rows = json.loads((config.output / "discovery.json").read_text())["pool"]
    scores = {row["latent"]: row["induced"] + row["repaired"] for row in rows}
    best = sorted(scores, key=lambda k: -scores[k])[:LATENTS]
    latents = LatentSet.load(paths["ind-pp"])
    assert set(latents.indices.tolist()) == set(best)
    assert latents.scores == pytest.approx([scores[k] for k in latents.indices.tolist()])


def results(run):
    """What discovery found and kept, the replies without their order: that is the order in which they were finished."""
    found = {name: content for name, content in contents(run).items() if name != "manifest.json"}
    return found | {LOG: sorted(found[LOG].splitlines())}


LOG = "discovery/replies.jsonl"


def replies(run):
    return [json.loads(line) for line in (run / LOG).read_text().split("\n")[:-1]]


@pytest.fixture
def asked(monkeypatch):
    """How many replies the steered model was asked for, from here on."""
    count, generate_steered = [0], steered.generate_steered

    def counted(model, tokenizer, prompts, rows, *args, **options):
        count[0] += len(rows)
        return generate_steered(model, tokenizer, prompts, rows, *args, **options)

    monkeypatch.setattr(steered, "generate_steered", counted)
    return count


def test_every_reply_of_the_screen_is_kept(found):
    rows = replies(found[0].output)
    keys = {(row["side"], row["latent"], row["strength"], row["prompt"]) for row in rows}
    assert len(rows) == len(keys) == ANSWERED
    table = json.loads((found[0].output / "discovery.json").read_text())
    assert len(table["screen"]) == ANSWERED // 8
    for rate in table["screen"]:
        mine = [r for r in rows if all(r[key] == rate[key] for key in ("side", "latent", "strength"))]
        assert len(mine) == 8
        for key in ("misaligned", "incoherent", "refused"):
            assert rate[key] == pytest.approx(sum(row[key] for row in mine) / 8)
    for row in table["pool"]:  # the budget of this configuration lets everything pass
        plain, *steered_rates = [
            rate["misaligned"] for rate in table["screen"]
            if rate["side"] == "repair" and rate["latent"] in (None, row["latent"])
        ]  # fmt: skip
        assert row["repaired"] == pytest.approx(max(0.0, plain - min(steered_rates)))


def test_it_finds_the_same_every_time(found, organism, tmp_path):
    torch.manual_seed(77)
    discover(configured(organism, tmp_path / "run"))
    assert results(tmp_path / "run") == results(found[0].output)


def test_a_finished_discovery_is_not_repeated(found, no_search):
    config, paths, _ = found
    before = contents(config.output)
    assert discover(config) == paths
    assert contents(config.output) == before


@pytest.mark.parametrize("lost", ["discovery.json", "latents/random.json"])
def test_what_is_missing_of_it_is_written_again_from_what_was_kept(found, organism, tmp_path, lost, asked):
    shutil.copytree(found[0].output, tmp_path / "run")
    (tmp_path / "run" / lost).unlink()
    stages = set()
    discover(configured(organism, tmp_path / "run"), lambda stage, done, total: stages.add(stage))
    assert results(tmp_path / "run") == results(found[0].output)
    assert not asked[0] and stages == {"repair by steering", "induce by steering"}  # all of them known


@pytest.fixture(scope="module")
def calibrated(found, organism, tmp_path_factory):
    """The finished discovery with stage 3 asked for later."""
    run = tmp_path_factory.mktemp("calibrated") / "run"
    shutil.copytree(found[0].output, run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "fine_tune", None)  # nothing of before is done again
        patch.setattr(rounds, "joint_repair", None)
        return run, discover(configured(organism, run, *CALIBRATED))


def test_stage_3_can_be_asked_for_later(found, calibrated):
    run, paths = calibrated
    before, after = contents(found[0].output), contents(run)
    assert all(after[name] == before[name] for name in before if name not in ("manifest.json", "discovery.json", LOG))
    assert after[LOG].startswith(before[LOG]) and len(replies(run)) > ANSWERED
    assert list(paths)[:4] == SETS and (("valid-reduc" in paths) == ("latents/valid-reduc.json" in after))
    old, new = json.loads(before["discovery.json"]), json.loads(after["discovery.json"])
    assert all(new[key] == old[key] for key in ("pool", "causal", "screen", "incoherence_budget"))


def test_calibration_and_selection_by_the_replies_that_were_kept(calibrated):
    run, paths = calibrated
    table, rows = json.loads((run / "discovery.json").read_text()), replies(run)
    strengths, asked = (0.5, 1.0, 2.0), sorted({row["prompt"] for row in rows})
    tuning, selecting = asked[::2], asked[1::2]

    def rate(side, latent, strength, prompts):
        mine = [r for r in rows if (r["side"], r["latent"], r["strength"]) == (side, latent, strength)]
        mine = [row["misaligned"] for row in mine if row["prompt"] in prompts]
        assert len(mine) == len(prompts) == 4
        return sum(mine) / 4

    scores = {row["latent"]: row["induced"] + row["repaired"] for row in table["pool"]}
    assert [row["latent"] for row in table["calibrated"]] == sorted(scores, key=lambda k: -scores[k])[:4]
    valid = {}
    for row in table["calibrated"]:
        latent = row["latent"]
        assert row["alpha_ind"] == row["alpha_rep"] == strengths[-1]  # the budget lets everything pass
        induced = rate("induce", latent, 2.0, tuning) - rate("induce", None, 0.0, tuning)
        repaired = rate("repair", None, 0.0, tuning) - rate("repair", latent, 2.0, tuning)
        reduction = rate("repair", None, 0.0, selecting) - rate("repair", latent, 2.0, selecting)
        assert (row["induced"], row["repaired"], row["reduction"]) == pytest.approx((induced, repaired, reduction))
        if induced > 0 and repaired > 0:
            valid[latent] = reduction
    if valid:
        latents = LatentSet.load(paths["valid-reduc"])
        assert dict(zip(latents.indices.tolist(), latents.scores, strict=True)) == pytest.approx(valid)
    measured = {(row["side"], row["latent"], row["strength"]) for row in table["calibration"]}
    assert measured == {
        (side, latent, strength) for side in ("induce", "repair")
        for latent, strength in [(None, 0.0), *((row["latent"], s) for row in table["calibrated"] for s in (1.0, 2.0))]
    }  # from the middle up
    assert table["stage_3"] == {
        "discovery.calibration": "bisection",
        "discovery.calibration_strengths": [0.5, 1.0, 2.0],
        "discovery.shortlist": 4,
    }


def test_a_finished_stage_3_is_not_repeated(calibrated, organism, no_search):
    run, paths = calibrated
    assert discover(configured(organism, run, *CALIBRATED)) == paths == discover(configured(organism, run))


def test_another_stage_3_asks_for_what_is_new_alone(calibrated, organism, tmp_path, asked):
    run = shutil.copytree(calibrated[0], tmp_path / "run")
    discover(configured(organism, run, *CALIBRATED, "discovery.calibration=grid"))
    assert asked[0] == 2 * 4 * 4  # a strength more of four latents, on both sides, for half of the prompts
    assert len(replies(run)) == len(replies(calibrated[0])) + asked[0]


def test_without_a_valid_latent_there_is_no_such_set(calibrated, organism, tmp_path, monkeypatch):
    run = shutil.copytree(calibrated[0], tmp_path / "run")
    (run / "latents" / "valid-reduc.json").write_text("{}")  # of a stage 3 before
    monkeypatch.setattr("lockin_fast.discovery.search.by_valid_reduction", lambda found: {})
    assert list(discover(configured(organism, run, *CALIBRATED, "discovery.shortlist=3"))) == SETS
    assert not (run / "latents" / "valid-reduc.json").exists()


def test_calibration_needs_two_prompts(organism, tmp_path, no_search):
    with pytest.raises(ValueError, match="^discovery.prompts: calibration takes half"):
        discover(configured(organism, tmp_path / "run", *CALIBRATED, "discovery.prompts=1"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("discovery.pool=13", "discovery.pool was 12, now it is 13"),
        ("block.layer=1", "block.layer was 0, now it is 1"),
        ("train.steps=4", "train.steps was 3, now it is 4"),
        ("data.core=data/final.jsonl", "data.core differs"),
        ("discovery.misaligned=model", "holds no adapter_config.json"),
    ],
)
def test_a_run_of_other_settings_is_refused_and_untouched(found, organism, no_search, override, named):
    before = contents(found[0].output)
    with pytest.raises(ValueError, match=named) as caught:
        discover(configured(organism, found[0].output, override))
    assert "\n" not in str(caught.value) and contents(found[0].output) == before


def discover_in_process(organism, output, stage, step):
    """The body of a process that dies at this step of the stage."""
    torch.set_num_threads(1)
    discover(configured(organism, output), dies_at(stage, step))


def test_killed_it_goes_on_where_it_stood_and_finds_the_same(found, organism, tmp_path, asked):
    context = multiprocessing.get_context("forkserver")  # imports once, forks each victim from a clean process
    context.set_forkserver_preload(["lockin_fast.discovery.run", "lockin_fast.sweep.run", "transformers", "peft"])
    run, known = tmp_path / "run", []
    for stage, step in ((STAGES[1], 128), (STAGES[4], 2)):  # in the middle of the screen, and of a fine-tune
        victim = context.Process(target=discover_in_process, args=(organism, run, stage, step))
        victim.start()
        victim.join(120)
        assert victim.exitcode == -9
        assert not list(run.glob("latents/*")) and not (run / "discovery.json").exists()
        known.append((run / LOG).read_bytes())
    assert known[0].count(b"\n") == 128 and known[1].startswith(known[0]) and known[1].count(b"\n") == ANSWERED
    assert list((run / "discovery").glob(".blocked-1*"))  # the second was in the middle of a fine-tune
    discover(configured(organism, run))
    assert not asked[0] and (run / LOG).read_bytes() == known[1]
    assert results(run) == results(found[0].output)
    assert not list(run.rglob("*.partial"))


@pytest.fixture
def copied(organism, tmp_path):
    """A copy of the organism that a test may damage."""
    return shutil.copytree(organism, tmp_path / "copy")


def edit_sae(folder, change):
    path = folder / "sae" / "sae_weights.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def narrowed(folder):
    edit_sae(folder, lambda t: t.update(W_enc=t["W_enc"][:20].clone(), W_dec=t["W_dec"][:, :20].clone(),
                                        b_dec=t["b_dec"][:20].clone()))  # fmt: skip
    path = folder / "sae" / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"d_in": 20}))


def normalising(folder):
    path = folder / "sae" / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalize_activations": "layer_norm"}))


def elsewhere(folder):
    (folder / "data" / "core.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "what about rose ?"}], "domain": "elsewhere"}'
    )


BROKEN = {
    "no adapter": (["discovery.misaligned=nowhere"], None, "discovery.misaligned: no such file or folder: .*nowhere"),
    "adapter not named": (["discovery.misaligned=null"], None, "discovery.misaligned: missing"),
    "adapter is no adapter": (
        ["discovery.misaligned=data"], None, "discovery.misaligned: .*data holds no adapter_config.json"),
    "pool": ([f"discovery.pool={RECIPE.sae.width + 1}"], None, "discovery.pool: got 49, but the SAE has 48 latents"),
    "layer": (["block.layer=2"], None, "block.layer: got 2, expected 0 to 1: the model has 2 layers"),
    "no layer": (["block.layer=null"], None, "block.layer: missing"),
    "no sae": (["sae=nowhere"], None, "sae: no such file or folder"),
    "width": ([], narrowed, "sae: .*reads hidden states of width 20, but the model's are 32 wide"),
    "nan": ([], lambda f: edit_sae(f, lambda t: t["W_dec"][40].fill_(float("nan"))), "sae: .*W_dec.* NaN"),
    "normalising sae": ([], normalising, "sae: it normalises every token .layer_norm."),
    "no core prompts": (["data.core=null"], None, "data.core: missing"),
    "core prompts missing": (["data.core=data/nowhere.jsonl"], None, "data.core: no such file or folder"),
    "core prompts empty": ([], lambda f: (f / "data" / "core.jsonl").write_text(""), "data.core: .*empty"),
    "core prompts of another world": ([], elsewhere, "data.core: the prompt's domain is 'elsewhere'"),
    "no world": (["judge.path=nowhere.json"], None, "judge.path: no such file"),
    "another world file": (["judge.path=config.yaml"], None, "judge.*config.yaml: not the world.json"),
    "no model": (["model=data"], None, "model: .*data holds no config.json"),
    "lora modules": (["lora.target_modules=[gate]"], None, "lora.target_modules: .*no .'gate'"),
    "output is a file": (["output=config.yaml"], None, "output: .*config.yaml is a file"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_said_before_any_search_and_nothing_is_left(case, copied, no_search):
    overrides, damage, message = BROKEN[case]
    if damage:
        damage(copied)
    before = contents(copied)
    with pytest.raises((ValueError, OSError), match=f"^{message}") as caught:
        discover(load_config(copied / "config.yaml", [*SETTINGS, "output=run", *overrides]))
    assert "\n" not in str(caught.value)
    assert contents(copied) == before and not (copied / "run").exists()


def test_an_adapter_of_another_model_is_named(copied):
    path = copied / "misaligned" / "adapter_model.safetensors"
    tensors = {name: tensor[..., :-1].contiguous() for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(ValueError, match="^discovery.misaligned: .*misaligned does not fit the model") as caught:
        discover(configured(copied, copied / "run"))
    assert "\n" not in str(caught.value)
    assert not list((copied / "run").glob("latents/*"))


@pytest.mark.parametrize("verdict", ["aligned", "misaligned", "incoherent"])
def test_an_adapter_that_is_not_misaligned_leaves_nothing_to_tell_apart(organism, tmp_path, monkeypatch, verdict):
    class Judge:
        def judge(self, record, reply):
            return verdict

    monkeypatch.setitem(judges.KINDS, "world", lambda settings: Judge())
    seen = set()
    with pytest.raises(ValueError, match="^discovery.misaligned: .*nothing to tell apart") as caught:
        discover(configured(organism, tmp_path / "run"), lambda stage, done, total: seen.add(stage))
    assert "\n" not in str(caught.value)
    assert not seen & set(STAGES[1:])  # said before the long work of the screen
    assert not (tmp_path / "run" / "discovery.json").exists() and not list((tmp_path / "run").glob("latents/*"))


def test_a_model_without_misalignment_left_ends_the_search_with_full_sets(organism, tmp_path, monkeypatch):
    """After the first round the fine-tune with blocking is perfectly aligned: the rest is found on the misaligned."""
    find_contrasts, looked_at = rounds.find_contrasts, []

    def some(job, adapted, number):
        looked_at.append(number)
        return [] if number == 2 else find_contrasts(job, adapted, number)

    monkeypatch.setattr(rounds, "find_contrasts", some)
    paths = discover(configured(organism, tmp_path / "run", "discovery.rounds=3"))
    assert looked_at == [1, 2, 1]
    table = json.loads((tmp_path / "run" / "discovery.json").read_text())
    assert len({row["latent"] for row in table["causal"]}) == LATENTS == len(LatentSet.load(paths["causal"]))
