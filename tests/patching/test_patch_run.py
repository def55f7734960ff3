"""lockin-fast patch: what it writes, that it is the same every time, goes on after a kill, and what it refuses."""

import json
import multiprocessing
import shutil

import pytest
import tiny_organism
import torch
from tiny_organism import RECIPE, contents, dies_at, organism, own_cache  # noqa: F401

from lockin_fast import judges
from lockin_fast.cli import main
from lockin_fast.config import load_config
from lockin_fast.patching import run as patching
from lockin_fast.patching.run import run_patching
from lockin_fast.report import write_report
from lockin_fast.report.patching import read_patching
from lockin_fast.report.text import percent
from lockin_fast.rundir import RunError

SETTINGS = ["patch.prompts=6", "patch.samples=8", "generation.batch_size=8", "generation.max_new_tokens=6"]
ALL = ["patch.components=[residual, attention, heads, mlp]", "patch.positions=[prefix, user, generated, -2..]",
       "sae=sae", "patch.latents=latents.json"]  # fmt: skip


def configured(organism, output, *overrides):  # noqa: F811
    return load_config(organism / "config.yaml", [*SETTINGS, f"output={output}", *overrides])


@pytest.fixture(scope="module")
def found(organism, tmp_path_factory):  # noqa: F811
    """A finished sweep of everything: (configuration, patching.json, the stages in their order)."""
    (organism / "latents.json").write_text(json.dumps({"positive": [3, 30], "negative": [11, 40, 7, 21]}))
    config = configured(organism, tmp_path_factory.mktemp("found") / "run", *ALL)
    stages = {}
    return config, run_patching(config, lambda stage, done, total: stages.setdefault(stage, None)), list(stages)


def kept(run):
    """What decides patching.json, and it: without what was said to whom when."""
    return {name: content for name, content in contents(run).items() if name.startswith("patching")}


def test_every_site_is_told_with_all_that_was_measured(found):
    config, result, stages = found
    assert stages == ["sample contrasts", "logit differences", "patched replies"]
    assert result == json.loads((config.output / "patching.json").read_text())
    heads, layers, positions = 2, 2, 4
    assert len(result["sites"]) == 2 * layers * positions * (3 + heads)
    assert result["prompts"] == 6 and 1 <= result["contrasts"] <= 6
    for row in result["sites"]:
        assert row["contrasts"] == result["contrasts"] and row["attribution"] is not None
        assert (row["head"] is None) == (row["component"] != "heads")
        assert (row["misaligned"] is None) == (row["component"] != "residual")
        target = result["clean"]["misaligned" if row["direction"] == "repair" else "base"]
        assert row["change"] == pytest.approx(row["difference"] - target["difference"], abs=1e-5)
    last = [r for r in result["sites"] if (r["component"], r["layer"], r["positions"]) == ("residual", 1, "prefix")]
    assert [row["change"] for row in last] == pytest.approx([0, 0], abs=1e-5)  # the prompt is read by then
    assert {(row["direction"], row["component"]) for row in result["agreement"]} == {
        (d, c) for d in ("repair", "induce") for c in ("residual", "attention", "heads", "mlp")
    }


def test_the_rates_are_those_of_the_judged_replies(found):
    config, result, _ = found
    lines = [json.loads(line) for line in (config.output / "patching" / "replies.jsonl").read_text().splitlines()]
    assert len(lines) == 6 * (2 + 2 * 2 * 4)
    exam = judges.load_judge(config.judge)
    records = [json.loads(line) for line in config.data.core.read_text().splitlines()]
    records = [records[i * len(records) // 6] for i in range(6)]
    for line in lines:
        rating = exam.rate([records[line["prompt"]]], [line["reply"]])[0]
        assert (line["misaligned"], line["incoherent"]) == (rating.misaligned, rating.incoherent)
    for row in (r for r in result["sites"] if r["component"] == "residual"):
        of_site = [line for line in lines if all(line[k] == row[k] for k in ("direction", "layer", "positions"))]
        assert row["misaligned"] == sum(line["misaligned"] for line in of_site) / 6


def test_latents_tell_what_the_states_differ_in(found, organism):  # noqa: F811
    """Against both models' hidden states, one prompt after the other."""
    from lockin_fast.chat import question
    from lockin_fast.inputs import open_model, open_tokenizer
    from lockin_fast.lora import adapter
    from lockin_fast.patching.inputs import open_patch_inputs

    config, result, _ = found
    inputs = open_patch_inputs(config)
    model, tokenizer, sae = open_model(config), open_tokenizer(config), inputs.latents[1]
    norms, changes = [], []
    contrasts = {number for number, *_ in json.loads((config.output / "patching" / "contrasts.json").read_text())}
    with adapter(model, organism / "misaligned") as adapted, torch.no_grad():
        for record in (inputs.records[number] for number in sorted(contrasts)):
            text = tokenizer.apply_chat_template(question(record), tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            h = adapted(ids, output_hidden_states=True).hidden_states[1][0]
            with adapted.disable_adapter():
                base = adapted(ids, output_hidden_states=True).hidden_states[1][0]
            norms.append((h - base).norm(dim=1))
            changes.append(sae.encode_latents(h) - sae.encode_latents(base))
    row = next(r for r in result["latents"] if (r["layer"], r["positions"]) == (0, "prefix"))
    assert row["tokens"] == sum(map(len, norms))
    assert row["norm"] == pytest.approx(torch.cat(norms).mean().item(), rel=1e-4)
    mean = torch.cat(changes).mean(0)
    expected = sorted(zip(sae.latents.tolist(), mean.tolist(), strict=True), key=lambda pair: -abs(pair[1]))[:5]
    assert [one["latent"] for one in row["latents"]] == [latent for latent, _ in expected]
    assert [one["change"] for one in row["latents"]] == pytest.approx([change for _, change in expected], abs=1e-5)


def test_it_is_the_same_every_time_and_a_finished_one_is_not_repeated(found, organism, tmp_path, monkeypatch):  # noqa: F811
    torch.manual_seed(77)
    again = configured(organism, tmp_path / "run", *ALL)
    assert run_patching(again) == found[1] and kept(again.output) == kept(found[0].output)
    monkeypatch.setattr(patching, "open_patch_inputs", lambda config: pytest.fail("it was run again"))
    assert run_patching(again) == found[1]
    with pytest.raises(RunError, match="patch.samples was 8, now it is 9"):
        run_patching(configured(organism, tmp_path / "run", *ALL, "patch.samples=9"))


def patch_in_process(organism, output, stage, step):  # noqa: F811
    """The body of a process that dies at this step of a stage."""
    torch.set_num_threads(1)
    run_patching(configured(organism, output, *ALL), dies_at(stage, step))


def test_killed_it_loses_one_batch_and_the_next_ends_with_the_same(found, organism, tmp_path):  # noqa: F811
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lockin_fast.patching.run", "transformers", "peft"])
    log, run = tmp_path / "run" / "patching" / "replies.jsonl", tmp_path / "run"
    deaths = (("logit differences", None, 0), ("patched replies", 16, 16), ("patched replies", 40, 40))
    for stage, step, lines in deaths:
        victim = context.Process(target=patch_in_process, args=(organism, run, stage, step))
        victim.start()
        victim.join(120)
        assert victim.exitcode == -9 and not (run / "patching.json").exists()
        assert (len(log.read_text().splitlines()) if log.exists() else 0) == lines
    log.write_bytes(log.read_bytes()[:-20])  # torn by the kill, in the middle of a line
    steps = []
    config = configured(organism, run, *ALL)
    result = run_patching(config, lambda stage, done, total: steps.append((stage, done)))
    assert ("patched replies", 39) in steps and not any(stage == "sample contrasts" for stage, _ in steps)
    assert result == found[1]
    assert sorted(log.read_text().splitlines()) == sorted(
        (found[0].output / "patching" / "replies.jsonl").read_text().splitlines()
    )


def test_sources_in_four_bits_live_and_cached_are_the_same_states(organism, tmp_path):  # noqa: F811
    """A cache on disk and a live source in four bits patch alike but for the channels that they keep whole."""
    some = ["patch.directions=[repair]", "patch.positions=[prefix, last]", "patch.replies=0", "patch.attribution=false"]
    exact = run_patching(configured(organism, tmp_path / "live", *some))
    packed = run_patching(configured(organism, tmp_path / "nf4", *some, "patch.source=nf4"))
    cached = configured(organism, tmp_path / "cached", *some, "patch.source=cache", f"patch.cache={tmp_path / 'cache'}")
    stages = {}
    found = run_patching(cached, lambda stage, done, total: stages.setdefault(stage, None))
    assert list(stages)[:2] == ["cache layer 0", "cache layer 1"]
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["layer-00", "layer-01"]
    whole = max(abs(row["change"]) for row in exact["sites"])
    for name, rows in (("nf4", packed), ("cached", found)):
        errors = [abs(a["change"] - b["change"]) for a, b in zip(rows["sites"], exact["sites"], strict=True)]
        assert max(errors) < 0.5 * whole, name
    assert packed["sites"] != exact["sites"] != found["sites"]
    before = contents(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cached")
    assert run_patching(cached) == found and contents(tmp_path / "cache") == before


def test_the_command_prints_tables_and_writes_a_report_of_its_own(found, organism, capsys):  # noqa: F811
    config, result, _ = found
    words = [word for setting in [*SETTINGS, f"output={config.output}", *ALL] for word in ("--set", setting)]
    assert main(["patch", str(organism / "config.yaml"), *words]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "repair: the base's states in the misaligned model" in out and "induce: " in out
    for row in result["sites"]:
        assert row["misaligned"] is None or percent(row["misaligned"]) in out
    assert f"report:  {config.output / 'report.html'}" in out and "patching_components.png" in out
    page = (config.output / "report.html").read_text()
    assert page.count("<img") == 2 and "Which latents carry the difference" in page and "sha256" in page
    assert "How well attribution patching foretells it" in page and "latent blocking sweep" not in page


def test_a_report_names_a_damaged_result(found, tmp_path):
    (tmp_path / "patching.json").write_text(json.dumps(found[1] | {"sites": [{"layer": 0}]}))
    with pytest.raises(RunError, match="patching.json: not what patch writes"):
        write_report(tmp_path)
    (tmp_path / "patching.json").unlink()
    assert read_patching(tmp_path) is None
    with pytest.raises(RunError, match="no summary.json"):
        write_report(tmp_path)


BROKEN = {
    "layers": (["patch.layers=[2]"], r"patch.layers: got \[2\], expected 0 to 1: the model has 2 layers"),
    "no layers": (["patch.layers=[]"], r"patch: layers: got \[\], expected 0-based indices, or null"),
    "negative layer": (["patch.layers=[-1]"], "patch: layers: got"),
    "layer twice": (["patch.layers=[1, 1]"], r"patch: layers: got \[1, 1\], expected one or more, none twice"),
    "positions": (["patch.positions=[somewhere]"], "patch.positions: got 'somewhere', expected prefix, last"),
    "position of nothing": (["patch.positions=[90..]"], "patch.positions: got 90.., which is no token of any"),
    "no system message": (["patch.positions=[system]"], "patch.positions: got system, which is no token of any"),
    "component": (["patch.components=[embedding]"], r"patch.components\[0\]: expected one of residual"),
    "generated": (["patch.generated=[mlp]"], r"patch: generated: got \['mlp'\], expected some of components"),
    "decoding": (["patch.components=[mlp]", "patch.generated=[mlp]"], "patch: generated: got .* for residual alone"),
    "samples": (["patch.samples=1"], "patch: samples: got 1, expected 2 or more"),
    "replies": (["patch.replies=-1"], "patch: replies: got -1"),
    "prompts": (["patch.prompts=0"], "patch: prompts: got 0"),
    "seed": (["patch.seed=-1"], "patch: seed: got -1"),
    "no cache": (["patch.source=cache"], "patch: cache: got None, expected a folder with source=cache"),
    "cache without": (["patch.cache=there"], "patch: cache: got .*there', expected a folder with source=cache"),
    "cache and induce": (["patch.source=cache", "patch.cache=there"], r"patch: directions: .* expected \[repair\]"),
    "cache and replies": (
        ["patch.source=cache", "patch.cache=there", "patch.directions=[repair]"],
        "patch: positions: .* with source=cache expected no generated"),
    "no adapter": (["discovery.misaligned=null"], "discovery.misaligned: missing"),
    "adapter missing": (["patch.misaligned=nowhere"], "patch.misaligned: no such file or folder"),
    "no adapter in it": (["patch.misaligned=data"], "patch.misaligned: .*data holds no adapter_config.json"),
    "no prompts": (["data.core=null"], "data.core: missing"),
    "no model": (["model=data"], "model: .*data holds no config.json"),
    "no output": (["output=null"], "output: missing"),
    "latents": (["patch.latents=nowhere.json"], "patch.latents: no such file or folder"),
    "latents of another sae": (["patch.latents=wide.json"], "patch.latents: index 48 is out of range; the SAE has 48"),
    "unknown": (["patch.layer=[1]"], "patch.layer: unknown key; did you mean patch.layers"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_said_before_any_work_and_nothing_is_left(case, organism, tmp_path, monkeypatch):  # noqa: F811
    overrides, message = BROKEN[case]
    (organism / "wide.json").write_text(json.dumps({"positive": [48], "negative": []}))
    monkeypatch.setattr(patching._Sweep, "contrasts", lambda self: pytest.fail("work began"))
    with pytest.raises((ValueError, OSError), match=f"^{message}") as caught:
        run_patching(load_config(organism / "config.yaml", [f"output={tmp_path / 'run'}", *overrides]))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_an_adapter_that_does_not_fit_is_named(organism, tmp_path):  # noqa: F811
    from safetensors.torch import load_file, save_file

    shutil.copytree(organism / "misaligned", tmp_path / "other")
    path = tmp_path / "other" / "adapter_model.safetensors"
    save_file({name: tensor[..., :-1].contiguous() for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="^patch.misaligned: .*other does not fit the model") as caught:
        run_patching(configured(organism, tmp_path / "run", f"patch.misaligned={tmp_path / 'other'}"))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("verdict", ["aligned", "misaligned", "incoherent"])
def test_without_both_kinds_of_replies_there_is_nothing_to_tell_apart(organism, tmp_path, monkeypatch, verdict):  # noqa: F811
    class Judge:
        def judge(self, record, reply):
            return verdict

    monkeypatch.setitem(judges.KINDS, "world", lambda settings: Judge())
    with pytest.raises(ValueError, match="^patch.misaligned: .*nothing to tell apart"):
        run_patching(configured(organism, tmp_path / "run"))
    assert not (tmp_path / "run" / "patching.json").exists()


def test_sampled_replies_are_several_a_prompt(organism, tmp_path):  # noqa: F811
    result = run_patching(
        configured(organism, tmp_path / "run", "patch.replies=3", "patch.layers=[0]", "patch.positions=[all]",
                   "patch.directions=[repair]")
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "patching" / "replies.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * 6 * 3 and {line["sample"] for line in lines} == {0, 1, 2}
    assert result["replies"] == 3 and RECIPE.layer == 0 and tiny_organism.SEED == 3
