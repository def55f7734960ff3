"""Competing methods and variants in one sweep: their trials, what each does to the training, what is refused early."""

import dataclasses
import json
from pathlib import Path

import pytest
import sweep_world
import torch
import yaml
from safetensors.torch import load_file, save_file

from lockin_fast.blocking import BlockPenalty, ConceptAblation, KLPenalty, LatentSet, PreventativeSteering
from lockin_fast.blocking.reference import Reference
from lockin_fast.config import ConfigError, load_config
from lockin_fast.inputs import open_inputs
from lockin_fast.lora import adapter
from lockin_fast.rundir import RunError
from lockin_fast.sweep import plan, run_sweep
from lockin_fast.sweep.directions import directions
from lockin_fast.sweep.methods import check_setups, set_up, stackable
from lockin_fast.sweep.plan import Trial

METHODS = {
    "lora": {"r": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]},
    "train": {
        "epochs": 2, "batch_size": 12, "learning_rate": 1e-2, "max_length": 32, "logging_steps": 1,
        "evaluate_epochs": True,
    },
    "discovery": {"misaligned": "misaligned"},
    "sweep": {
        "lambdas": [100.0],
        "seeds": [0],
        "latents": {"causal": "latents/causal.json", "random": "latents/random.json"},
        "sizes": [None, 3],
        "sides": ["both", "positive", "shuffled"],
        "unions": {"together": ["causal", "random"]},
        "layers": {"two-layers": [
            {"layer": 0, "sae": "sae", "latents": "latents/causal.json"},
            {"layer": 2, "sae": "sae", "latents": "latents/random.json"},
        ]},
    },
    "baselines": {
        "kl": [0.5],
        "steering": {"shift": [2.0], "causal": [1.0], "file": [0.5]},
        "ablation": ["random", "pca"],
        "directions": {"file": "direction.safetensors"},
        "components": 2,
        "frozen_above": [0, 100.0],
    },
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("vowel_judge", "one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny world with core prompts, a misaligned adapter, a direction in a file, and the settings above."""
    folder = tmp_path_factory.mktemp("world")
    path = sweep_world.build_world(folder)
    values = yaml.safe_load(path.read_text()) | METHODS
    values["data"]["core"] = "data/in_domain.jsonl"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    save_file({"direction": torch.arange(16.0) - 7}, folder / "direction.safetensors")
    save_file({"direction": torch.ones(2, 16)}, folder / "two.safetensors")
    from lockin_fast.sweep.single import run_training

    run_training(load_config(path, ["output=single", "train.evaluate_epochs=false"]))
    (folder / "single" / "adapter").rename(folder / "misaligned")
    return path


@pytest.fixture(scope="module")
def inputs(world):
    config = load_config(world, ["output=unused"])
    return open_inputs(config, config.sweep.latents)


@pytest.fixture(scope="module")
def finished(world):
    config = load_config(world, ["output=finished", "sweep.sizes=[null]", "sweep.sides=[both, shuffled]"])
    return config, run_sweep(config)


def test_every_trial_of_the_plan_has_a_name_of_its_own(world):
    names = [trial.name for trial in plan(load_config(world))]
    assert names == [
        "base",
        "baseline-lambda0-seed0",
        *(f"{name}{size}{side}-lambda100-seed0" for name in ("causal", "random", "together")
          for size in ("", "-k3") for side in ("", "-positive", "-shuffled")),
        "two-layers-lambda100-seed0",
        "kl-lambda0.5-seed0",
        "steering-shift-strength2-seed0", "steering-causal-strength1-seed0", "steering-file-strength0.5-seed0",
        "ablation-random-seed0", "ablation-pca-seed0",
        "frozen_above-lambda0-seed0", "frozen_above-causal-lambda100-seed0", "frozen_above-random-lambda100-seed0",
        "frozen_above-two-layers-lambda100-seed0",
    ]  # fmt: skip


def test_variants_are_the_parts_they_are_called_after(inputs):
    causal = inputs.latents["causal"]  # positive 1, 5, 9; negative 2
    assert inputs.latent_set("causal-k3").indices.tolist() == [1, 5, 2]
    assert inputs.latent_set("causal-k3-positive").indices.tolist() == [1, 5]
    shuffled = inputs.latent_set("causal-shuffled")
    assert set(shuffled.indices.tolist()) == set(causal.indices.tolist()) and shuffled.positive != causal.positive
    assert (len(shuffled.positive), len(shuffled.negative)) == (3, 1)
    union = inputs.latent_set("together")
    assert (union.positive, union.negative) == ((1, 5, 9, 30, 31), (2, 40, 41))


def test_a_set_at_two_layers_is_two_penalties_of_one_lambda(inputs):
    first, second = set_up(Trial("two-layers", 7.0, 0), inputs).terms
    assert isinstance(first, BlockPenalty) and (first.layer, second.layer, first.weight) == (0, 2, second.weight)
    assert first.latents.indices.tolist() == [1, 5, 9, 2] and second.latents.indices.tolist() == [30, 31, 40, 41]


def test_each_method_does_what_it_says(inputs):
    (kl,) = set_up(Trial(None, 0.5, 0, "kl"), inputs).terms
    assert isinstance(kl, KLPenalty) and (kl.weight, kl.direction) == (0.5, "model_to_base")
    (steering,) = set_up(Trial(None, 2.0, 0, "steering", "file"), inputs).interventions
    h = torch.zeros(1, 1, 16)
    assert isinstance(steering, PreventativeSteering) and steering.layer == 1
    assert torch.equal(steering.edit(h)[0, 0], 2 * (torch.arange(16.0) - 7))
    (steering,) = set_up(Trial(None, 3.0, 0, "steering", "causal"), inputs).interventions
    rows = load_file(inputs.config.sae / "sae_weights.safetensors")["W_dec"][[1, 5, 9, 2]]
    units = rows / rows.norm(dim=1, keepdim=True) * torch.tensor([1, 1, 1, -1])[:, None]
    expected = 3 * units.sum(0) / units.sum(0).norm()
    assert torch.allclose(steering.edit(h)[0, 0], expected, rtol=1e-5, atol=1e-6)
    alone = dataclasses.replace(inputs, latents={"one": LatentSet((), (5,))})
    (steering,) = set_up(Trial(None, 3.0, 0, "steering", "one"), alone).interventions
    assert torch.allclose(steering.edit(h)[0, 0], -3 * rows[1] / rows[1].norm(), rtol=1e-5, atol=1e-6)
    (ablation,) = set_up(Trial(None, 1.0, 0, "ablation", "random"), inputs).interventions
    assert isinstance(ablation, ConceptAblation)
    rows = load_file(inputs.config.sae / "sae_weights.safetensors")["W_dec"][[30, 31, 40, 41]]
    assert (ablation.edit(torch.randn(1, 5, 16)) @ rows.T).abs().max() < 1e-4
    assert set_up(Trial(None, 0.0, 0, "frozen_above"), inputs).lora.layers == (0, 1)
    assert set_up(Trial("two-layers", 1.0, 0, "frozen_above"), inputs).lora.layers == (0, 1, 2)


def test_adapters_that_are_all_frozen_are_refused(inputs):
    lora = dataclasses.replace(inputs.config.lora, layers=(2,))
    above = dataclasses.replace(inputs, config=dataclasses.replace(inputs.config, lora=lora))
    with pytest.raises(ConfigError, match=r"lora.layers: all of \[2\] are above the blocked layer 1; nothing would"):
        set_up(Trial(None, 0.0, 0, "frozen_above"), above)


@pytest.mark.parametrize("method", ["steering", "ablation"])
def test_a_latent_that_decodes_to_nothing_is_told_before_training(inputs, method):
    decoder = inputs.sae.decoder.clone()
    decoder[list(inputs.sae.latents).index(5)] = 0.0
    dead = dataclasses.replace(inputs, sae=dataclasses.replace(inputs.sae, decoder=decoder))
    with pytest.raises(ConfigError, match=f"^baselines.{method}: direction.*: (a direction is zero|.* not finite)"):
        check_setups([Trial(None, 1.0, 0, method, "causal")], dead)


def test_shift_and_components_are_those_of_the_tokens_differences(inputs):
    every, means = [], []
    with adapter(inputs.model, inputs.config.discovery.misaligned) as adapted:
        for line in inputs.config.data.core.open():
            text = inputs.tokenizer.apply_chat_template(
                json.loads(line)["messages"], tokenize=False, add_generation_prompt=True
            )
            ids = {"input_ids": inputs.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]}
            tuned, base = (Reference(adapted, 1, adapters=off).hidden_state((), ids)[0] for off in (False, True))
            every.append((tuned - base).double())
            means.append(every[-1].mean(0))
    shift = torch.stack(means).mean(0)
    assert torch.allclose(directions(inputs, "shift")[1][0].double(), shift, rtol=1e-6) and shift.norm() > 0
    _, _, axes = torch.linalg.svd(torch.cat(every) - torch.cat(every).mean(0), full_matrices=False)
    found = directions(inputs, "pca")[1].double()
    assert found.shape == (2, 16) and ((found @ axes[:2].T).abs() - torch.eye(2)).abs().max() < 1e-5


def test_a_persona_vector_file_gives_the_row_of_the_layer(inputs, tmp_path):
    by_hidden_state = torch.randn(sweep_world.LAYERS + 1, 16)
    torch.save(by_hidden_state, tmp_path / "evil.pt")
    baselines = dataclasses.replace(inputs.config.baselines, directions={"evil": tmp_path / "evil.pt"}, layers=(0, 2))
    found = directions(
        dataclasses.replace(inputs, config=dataclasses.replace(inputs.config, baselines=baselines)), "evil"
    )
    assert torch.equal(found[0], by_hidden_state[1:2]) and torch.equal(found[2], by_hidden_state[3:4])


def test_one_sweep_runs_them_all_and_every_method_changes_the_training(finished):
    config, summary = finished
    rows = [summary["base"], *summary["baseline"]["trials"], *summary["trials"]]
    assert [row["name"] for row in rows] == [trial.name for trial in plan(config)]
    assert {row["method"] for row in rows} == {
        "base", "unblocked", "block", "kl", "steering", "ablation", "frozen_above",
    }  # fmt: skip
    weights = {}
    for row in rows[1:]:
        tensors = load_file(config.output / "trials" / row["name"] / "adapter_model.safetensors")
        weights[row["name"]] = torch.cat([tensors[name].flatten() for name in sorted(tensors)])
        layers = {int(name.split("layers.")[1].split(".")[0]) for name in tensors}
        frozen = row["method"] == "frozen_above" and row["latents"] != "two-layers"
        assert layers == ({0, 1} if frozen else {0, 1, 2}), row["name"]
    lora_everywhere = {"two-layers-lambda100-seed0", "frozen_above-two-layers-lambda100-seed0"}  # 2 is the last layer
    names = list(weights)
    for i, name in enumerate(names):
        for other in names[:i]:
            a, b = weights[name], weights[other]
            same = a.shape == b.shape and torch.equal(a, b)
            assert same == ({name, other} == lora_everywhere), (name, other)
    by_name = {row["name"]: row for row in rows}
    assert by_name["kl-lambda0.5-seed0"]["kl"] > 0 and by_name["kl-lambda0.5-seed0"]["penalty"] is None
    assert by_name["two-layers-lambda100-seed0"]["layers"] == [0, 2]
    assert by_name["two-layers-lambda100-seed0"]["latent_count"] == 8
    assert by_name["steering-shift-strength2-seed0"]["directions"] == "shift"
    assert set(summary["best_per_set"]) == {
        "causal", "causal-shuffled", "random", "random-shuffled", "together", "together-shuffled", "two-layers",
    }  # fmt: skip
    assert set(summary["best_per_method"]) == {
        "kl", "steering shift", "steering causal", "steering file", "ablation random", "ablation pca",
        "frozen above", "frozen above causal", "frozen above random", "frozen above two-layers",
    }  # fmt: skip


def test_every_epoch_is_judged_and_judging_changes_nothing(finished, world):
    config, summary = finished
    for row in [*summary["baseline"]["trials"], *summary["trials"]]:
        assert [epoch["epoch"] for epoch in row["epochs"]] == [1.0, 2.0]
        last = row["epochs"][-1]
        assert all(last[rate] == row[rate] for rate in ("em", "incoherence", "in_domain"))
    plain = load_config(
        world,
        ["output=plain", "sweep.stack=1", "train.evaluate_epochs=false", "baselines={}",
         "sweep.latents={causal: latents/causal.json}",
         "sweep.sizes=[null]", "sweep.sides=[both]", "sweep.unions={}", "sweep.layers={}"],
    )  # fmt: skip
    run_sweep(plain)
    for name in ("baseline-lambda0-seed0", "causal-lambda100-seed0"):
        one, other = (
            load_file(c.output / "trials" / name / "adapter_model.safetensors") for c in (config, plain)
        )
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_settings_are_part_of_the_run_and_lists_may_grow(finished, world):
    config, summary = finished
    given = ["output=finished", "sweep.sizes=[null]", "sweep.sides=[both, shuffled]"]
    with pytest.raises(RunError, match="baselines.kl_direction was 'model_to_base', now it is 'base_to_model'"):
        run_sweep(load_config(world, [*given, "baselines.kl_direction=base_to_model"]))
    with pytest.raises(RunError, match=r"baselines.kl was \[0.5\], now it is \[\]"):
        run_sweep(load_config(world, [*given, "baselines.kl=[]"]))
    stages = set()
    longer = run_sweep(load_config(world, [*given, "baselines.kl=[0.5, 2]"]), lambda stage, *_: stages.add(stage))
    assert [stage.split("] ")[1] for stage in stages] == ["kl-lambda2-seed0"]
    assert len(longer["trials"]) == len(summary["trials"]) + 1


def test_what_a_stack_cannot_train_is_told(inputs):
    plain = dataclasses.replace(inputs.config.train, evaluate_epochs=False)
    config = dataclasses.replace(inputs.config, train=plain)
    told = {trial.name: stackable(trial, config) for trial in plan(config)}
    assert {name for name, can in told.items() if can} == {
        name for name in told if name.startswith(("baseline", "causal", "random", "together", "two-layers", "kl"))
    }
    assert not any(stackable(trial, inputs.config) for trial in plan(config)), "judged after every epoch"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("baselines.kl=[-1]", r"baselines.kl: got \[-1.0\], expected values above 0 and finite"),
        ("baselines.kl=[1, 1]", r"baselines.kl: got \[1.0, 1.0\], expected no value twice"),
        ("baselines.frozen_above=[-5]", r"baselines.frozen_above: got \[-5.0\], expected 0 or more"),
        ("baselines.steering={shift: [0]}", r"baselines.steering: got \[0.0\], expected finite strengths other than 0"),
        ("baselines.steering={pca: [1]}", "baselines.steering: pca is several directions"),
        ("baselines.steering={nobody: [1]}", "baselines: 'nobody' names no directions; known are causal, random, ca"),
        ("baselines.ablation=[nobody]", "baselines: 'nobody' names no directions"),
        ("baselines.directions={shift: direction.safetensors}", "baselines.directions.shift: directions are named"),
        ("baselines.directions.file=nowhere.pt", "baselines.directions.file: no such file or folder"),
        ("baselines.directions.file=world.json", "baselines.steering: .*world.json: no tensor can be read from it"),
        ("baselines.directions.file=sae/sae_weights.safetensors", "baselines.steering: .*expected one tensor"),
        ("baselines.directions.file=two.safetensors", "baselines.steering.file: got 2 directions, expected one to add"),
        ("baselines.layers=[3]", r"baselines.layers: got \[3\], expected indices from 0 to 2"),
        ("baselines.layers=[0]", r"baselines.layers: got \[0\], but causal has decoder rows of layer 1"),
        ("baselines.kl_direction=both", "baselines.kl_direction: expected one of model_to_base, base_to_model"),
        ("baselines.components=0", r"baselines.components: got \[0\]"),
        ("baselines.strength=1", "baselines.strength: unknown key"),
        ("discovery.misaligned=null", "discovery.misaligned: missing"),
        ("lora.layers=[2]", "lora.layers: the lowest is 2, above the penalised layer 1, so the penalty could change"),
        (
            "lora.layers=[1, 2]",  # of the set that blocks the layers 0 and 2
            "lora.layers: the lowest is 1, above the penalised layer 0, so the penalty could change nothing",
        ),
        ("sweep.sizes=[0]", r"sweep.sizes: got \[0\], expected 1 or more"),
        ("sweep.sizes=[]", r"sweep.sizes: got \[\], expected one or more"),
        ("sweep.sizes=[9]", "latents causal-k9: k: got 9, expected 1 to 4, the size of the set"),
        ("sweep.sides=[up]", r"sweep.sides\[0\]: expected one of both, positive, negative, shuffled"),
        ("sweep.unions={u: [causal, nobody]}", r"sweep.unions.u: got \['causal', 'nobody'\], expected two or more of"),
        ("sweep.unions={u: [causal]}", r"sweep.unions.u: got \['causal'\]"),
        ("sweep.unions={random: [causal, random]}", "sweep.unions.random: a latent set has that name already"),
        ("sweep.unions={a b: [causal, random]}", "sweep.unions.a b: a set is named with letters"),
        (
            "sweep.latents.kl=latents/causal.json; baselines.kl=[100]",
            "sweep.latents: two trials would be called kl-lambda100-seed0",
        ),
        (
            "sweep.latents.causal-positive=latents/random.json",
            "sweep.latents: two latent sets would be called causal-positive",
        ),
        ("block.reference=cache", "sweep.layers: a cache is of block.layer alone, so it cannot serve two-layers; set"),
        ("sweep.layers={one: []}", r"sweep.layers.one: got the layers \[\], expected one or more from 0"),
        (
            "sweep.layers={causal: [{layer: 0, sae: sae, latents: latents/causal.json}]}",
            "sweep.layers.causal: a latent set has that name already",
        ),
        (
            "sweep.layers={far: [{layer: 9, sae: sae, latents: latents/causal.json}]}",
            "latents far: layer: got 9, expected 0 to 2",
        ),
        (
            "sweep.layers={far: [{layer: 1, sae: nowhere, latents: latents/causal.json}]}",
            "sweep.layers.far.1.sae: no such file or folder",
        ),
        ("sweep.layers={far: [{layer: 1, sae: sae}]}", "sweep.layers.far"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_any_training(world, override, message, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("training started")

    monkeypatch.setattr("lockin_fast.sweep.trial.fine_tune", fail)
    monkeypatch.setattr("lockin_fast.sweep.trial.generate", fail)
    with pytest.raises(ConfigError, match=message) as caught:
        run_sweep(load_config(world, ["output=refused", *override.split("; ")]))
    assert "\n" not in str(caught.value)
    assert not (world.parent / "refused").exists()


def test_the_pages_settings_are_understood(tmp_path):
    page = (Path(__file__).parents[1] / "docs/methods.md").read_text()
    (block,) = [text.split("```")[0] for text in page.split("```yaml\n") if "baselines:" in text.split("```")[0]]
    (tmp_path / "run.yaml").write_text(block)
    config = load_config(tmp_path / "run.yaml", [f"output={tmp_path / 'run'}"])
    names = {trial.name for trial in plan(config)}
    assert {"both-found-k10-shuffled-lambda1000-seed0", "two-lambda100-seed0", "kl-lambda0.01-seed0"} <= names
    assert {"steering-evil-strength1-seed0", "ablation-pca-seed0", "frozen_above-again-lambda1000-seed0"} <= names


def test_one_sided_sets_have_no_shuffle_and_no_other_side(world, tmp_path):
    (tmp_path / "up.json").write_text('{"positive": [1, 2]}')
    for side, message in (("negative", "the set has no negative latents"), ("shuffled", "have one sign")):
        overrides = [
            f"sweep.latents={{up: {tmp_path}/up.json}}", f"sweep.sides=[{side}]", "sweep.sizes=[null]", "baselines={}",
            "sweep.unions={}", "sweep.layers={}", "output=refused",
        ]  # fmt: skip
        with pytest.raises(ConfigError, match=f"latents up-{side}: .*{message}"):
            run_sweep(load_config(world, overrides))
