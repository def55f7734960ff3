"""Stage 1 alone, from a configuration: its table, several layers, several processes, and a discovery that goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_discover import SETTINGS
from tiny_organism import RECIPE, WORLD, contents

from lockin_fast import cli
from lockin_fast.config import load_config
from lockin_fast.discovery import discover
from lockin_fast.discovery.attribution import agreement
from lockin_fast.discovery.shift import measure_shift
from lockin_fast.discovery.shift_sums import ShiftStatistics
from lockin_fast.discovery.shift_table import read_largest
from lockin_fast.generation import generate
from lockin_fast.inputs import open_inputs
from lockin_fast.lora import adapter
from lockin_fast.sae import load_sae

parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
LAYER, WIDTH = RECIPE.layer, RECIPE.sae.width
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture(scope="module")
def settings(organism, tmp_path_factory):
    """Stage 1 at the organism's layer and, with another SAE, at the other one."""
    other = tmp_path_factory.mktemp("other") / "sae"
    other.mkdir()
    tensors = load_file(organism / "sae" / "sae_weights.safetensors")
    tensors["W_enc"] = tensors["W_enc"].flip(0).contiguous()
    save_file(tensors, other / "sae_weights.safetensors")
    (other / "cfg.json").write_bytes((organism / "sae" / "cfg.json").read_bytes())
    return [*SETTINGS, "discovery.stage=shift", f"discovery.saes={{1: {other}}}"]


def configured(organism, settings, output, *more):
    return load_config(organism / "config.yaml", [*settings, f"output={output}", *more])


@pytest.fixture(scope="module")
def found(organism, settings, tmp_path_factory):
    config = configured(organism, settings, tmp_path_factory.mktemp("stage1") / "run")
    return config, discover(config)


@pytest.fixture(scope="module")
def expected(organism, found):
    config = found[0]
    inputs = open_inputs(config, {})
    prompts = [row["messages"] for row in WORLD.prompts("core")]
    replies = generate(inputs.model, inputs.tokenizer, prompts, max_new_tokens=10, batch_size=64)
    told = [[*p, {"role": "assistant", "content": text}] for p, text in zip(prompts, replies, strict=True)]
    saes = {LAYER: load_sae(config.sae), 1: load_sae(config.discovery.saes["1"])}
    with adapter(inputs.model, organism / "misaligned") as adapted:
        sums = measure_shift(adapted, inputs.tokenizer, told, saes)
    return {layer: of_layer.statistics() for layer, of_layer in sums.items()}


def test_the_table_has_every_latent_of_every_layer_largest_first(found, expected):
    path = found[1]["shift"]
    assert found[1] == {"shift": found[0].output / "discovery" / "shift.parquet"} and path.is_file()
    table = parquet.read_table(path)
    assert table.column_names == ["layer", "latent", *ShiftStatistics._fields]
    rows = table.to_pylist()
    assert [row["layer"] for row in rows] == [LAYER] * WIDTH + [1] * WIDTH
    for layer, statistics in expected.items():
        of_layer = [row for row in rows if row["layer"] == layer]
        assert sorted(row["latent"] for row in of_layer) == list(range(WIDTH))
        sizes = [abs(row["shift"]) for row in of_layer]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] > 0
        for name, values in statistics._asdict().items():
            for row in of_layer:
                assert row[name] == pytest.approx(values[row["latent"]].item(), rel=1e-9), name
    assert read_largest(path, 3) == {layer: [r for r in rows if r["layer"] == layer][:3] for layer in (LAYER, 1)}


def test_the_command_shows_the_largest(organism, settings, found, capsys):
    words = [word for setting in (*settings, f"output={found[0].output}") for word in ("--set", setting)]
    before = contents(found[0].output)
    assert cli.main(["discover", str(organism / "config.yaml"), *words]) == 0
    shown = capsys.readouterr().out
    first = read_largest(found[1]["shift"], 15)
    for layer, rows in first.items():
        assert f"layer {layer}: latent" in shown
        for row in rows:
            assert f"{row['shift']:.3g}" in shown and f"{row['t']:.3g}" in shown
    assert f"table:   {found[1]['shift']}" in shown
    assert contents(found[0].output).keys() == before.keys()


def test_a_discovery_goes_on_from_it(organism, settings, found, tmp_path, monkeypatch):
    """The whole discovery in that folder finds stage 1 done, and the same as a discovery on its own."""
    run = tmp_path / "run"
    discover(configured(organism, settings, run))
    before = contents(run / "discovery")

    def fail(*arguments, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr("lockin_fast.discovery.shift.segment_stats", fail)
    monkeypatch.setattr("lockin_fast.discovery.search.find_contrasts", lambda *arguments: [1])

    def stops(self, side, model, shift, pool):
        raise KeyboardInterrupt(pool)

    monkeypatch.setattr("lockin_fast.discovery.search.Search._screened", stops)
    with pytest.raises(KeyboardInterrupt) as stopped:
        discover(configured(organism, settings, run, "discovery.stage=all"))
    rows = read_largest(run / "discovery" / "shift.parquet", WIDTH)[LAYER]
    assert stopped.value.args[0] == [row["latent"] for row in rows[: len(stopped.value.args[0])]]
    assert contents(run / "discovery") == before


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("block.layer=0\ngeneration.max_new_tokens=9", "generation.max_new_tokens was 10, now it is 9"),
        ("data.core=data/final.jsonl", "holds another shift: data.core differs"),
        ("discovery.saes={}", "holds another shift: discovery.saes"),
    ],
)
def test_the_table_of_other_settings_is_refused(organism, settings, found, override, named):
    before = contents(found[0].output)
    with pytest.raises(ValueError, match=named):
        discover(configured(organism, settings, found[0].output, *override.split("\n")))
    assert contents(found[0].output) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("discovery.saes={2: sae}", "^discovery.saes.2: layer 2: expected 0 to 1"),
        (f"discovery.saes={{{LAYER}: sae}}", f"^discovery.saes: layer {LAYER} is block.layer"),
        ("discovery.saes={1: nowhere}", "^discovery.saes.1: no such file"),
        ("discovery.stage=first", "^discovery.stage: expected one of all, shift"),
        ("discovery.saes={one: sae}", "^discovery: saes: got .* by the layer that they read"),
    ],
)
def test_bad_settings_are_named_before_any_work(organism, settings, tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        discover(configured(organism, settings, tmp_path / "run", override))
    assert not (tmp_path / "run").exists()


def test_without_pyarrow_it_says_what_to_install(organism, settings, tmp_path, monkeypatch):
    monkeypatch.setattr("lockin_fast.discovery.shift_table.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'lockin-fast\[tables\]'"):
        discover(configured(organism, settings, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_other_stages_run_in_one_process(organism, settings, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="^discovery.stage: several processes share stage shift alone"):
        discover(configured(organism, settings, tmp_path / "run", "discovery.stage=all"))


@pytest.mark.slow  # two processes that import everything
def test_two_processes_make_the_same_table(organism, settings, tmp_path):
    core = tmp_path / "core.jsonl"  # enough for three batches of the shift
    core.write_text(3 * (organism / "data" / "core.jsonl").read_text())
    given = [*settings, f"data.core={core}", "generation.batch_size=5"]
    one = discover(configured(organism, given, tmp_path / "one"))["shift"]
    words = [word for setting in (*given, f"output={tmp_path / 'two'}") for word in ("--set", setting)]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, "-m", "lockin_fast.cli", "discover", str(organism / "config.yaml"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("table:   ") == 1  # the first process alone prints
    kept = sorted(path.name for path in (tmp_path / "two" / "discovery" / "shift").iterdir())
    assert kept == ["rank-0000.safetensors", "rank-0001.safetensors"]
    assert json.loads((tmp_path / "two" / "manifest.json").read_text()).keys() == {"shift"}
    one, two = (parquet.read_table(path).to_pylist() for path in (one, tmp_path / "two" / "discovery/shift.parquet"))
    by_latent = {(row["layer"], row["latent"]): row for row in one}
    for row in two:
        for name, value in by_latent[row["layer"], row["latent"]].items():
            assert row[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name
    assert max(abs(row["shift"]) for row in two) > 0


@pytest.mark.parametrize("by", ["report", "attribution"])
def test_a_prescreen_says_how_well_it_foretold_the_screen(organism, tmp_path, by):
    given = [*SETTINGS, f"output={tmp_path / 'run'}", f"discovery.prescreen={by}"]
    config = load_config(organism / "config.yaml", given)
    stages = []
    discover(config, lambda stage, done, total: stages.append(stage))
    assert {"gradients of the misaligned model", "gradients of the base model"} <= set(stages)
    table = json.loads((tmp_path / "run" / "discovery.json").read_text())
    pool, report = [row["latent"] for row in table["pool"]], table["prescreen"]
    assert [row["latent"] for row in report["latents"]] == pool
    rows = read_largest(tmp_path / "run" / "discovery" / "shift.parquet", WIDTH)[LAYER]
    shifted = [row["latent"] for row in rows]
    size = config.discovery.pool
    if by == "report":
        assert report["pool_by"] == "shift" and pool == shifted[:size]
    else:
        both = [row["induce"] + row["repair"] for row in report["latents"]]
        assert report["pool_by"] == "attribution" and set(pool) != set(shifted[:size])
        assert both == sorted(both, reverse=True) and both[0] > 0
        moved = {row["latent"] for row in rows if row["shift"]}
        assert set(pool) <= moved
        chosen = {row["latent"] for row in table["causal"][: config.discovery.latents // 2]}
        repairs = {row["latent"] for row in table["pool"] if row["repaired"] > 0}
        assert chosen <= repairs or repairs <= chosen  # of the pool that attribution chose
    top = json.loads((tmp_path / "run" / "latents" / "top-delta.json").read_text())
    assert {*top["positive"], *top["negative"]} == set(shifted[: config.discovery.latents])
    gains = [row["induced"] + row["repaired"] for row in table["pool"]]
    foretold = [row["induce"] + row["repair"] for row in report["latents"]]
    assert report["agreement"]["attribution"]["both"] == agreement(foretold, gains, config.discovery.latents)
    sizes = [abs(row["shift"]) for row in table["pool"]]
    assert report["agreement"]["shift"]["both"] == agreement(sizes, gains, config.discovery.latents)
    assert report["agreement"]["attribution"].keys() == {"induce", "repair", "both"}
