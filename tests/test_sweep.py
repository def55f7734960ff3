"""The sweep: its contract, what it refuses before training, and that no kill, full disk or second run changes it."""

import dataclasses
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sweep_world
import torch
from safetensors.torch import load_file, save_file

from lockin_fast import dispatch
from lockin_fast.config import ConfigError, load_config
from lockin_fast.dispatch import OpBackend, backends
from lockin_fast.exam import open_exam
from lockin_fast.inputs import open_inputs
from lockin_fast.lora import adapter
from lockin_fast.provenance import slow_kernels
from lockin_fast.report import write_report
from lockin_fast.rundir import RunError, claim, hash_files
from lockin_fast.sweep import run as sweep_run
from lockin_fast.sweep import run_sweep
from lockin_fast.sweep.engines import TrialsFailed
from lockin_fast.sweep.single import run_training
from lockin_fast.sweep.summary import summarise
from lockin_fast.sweep.trial import Trial, run_trial

TIMINGS = ("seconds_per_step", "peak_bytes")
RATES = ("em", "incoherence", "refusal", "in_domain")
KILLS = 5


pytestmark = pytest.mark.usefixtures("vowel_judge", "one_thread")


@pytest.fixture(scope="module")
def finished(world):
    """A finished sweep of one seed: (configuration, summary)."""
    config = load_config(world, ["output=finished", "sweep.seeds=[0]"])
    return config, run_sweep(config)


@pytest.fixture
def copied(world, tmp_path):
    """A copy of the world that a test may damage, without any run in it."""
    folder = tmp_path / "copy"
    shutil.copytree(world.parent, folder, ignore=shutil.ignore_patterns("finished*", "run*", "killed*"))
    return folder


@pytest.fixture
def no_training(monkeypatch):
    """Any training is a failure of the test."""

    def fail(*args, **kwargs):
        raise AssertionError("training started")

    monkeypatch.setattr("lockin_fast.sweep.trial.fine_tune", fail)
    monkeypatch.setattr("lockin_fast.sweep.trial.generate", fail)


def untimed(value):
    """The value without timings, anywhere inside."""
    if isinstance(value, dict):
        return {key: untimed(child) for key, child in value.items() if key not in TIMINGS}
    return [untimed(child) for child in value] if isinstance(value, list) else value


def read(path):
    return json.loads(Path(path).read_text())


def test_summary_has_the_contracts_shape(finished):
    config, summary = finished
    assert summary == read(config.output / "summary.json")
    assert [(row["latents"], row["lambda"]) for row in summary["trials"]] == [
        (name, weight) for name in ("causal", "random") for weight in (1.0, 100.0)
    ]
    assert summary["base"]["lambda"] is None and summary["baseline"]["lambda"] == 0
    for row in [*summary["trials"], summary["baseline"], summary["base"]]:
        assert {"lambda", "latents", *RATES, *TIMINGS, "sft_loss", "penalty"} <= row.keys()
        assert all(0 <= row[rate] <= 1 for rate in RATES)
    assert all(row["penalty"] > 0 and row["seconds_per_step"] > 0 for row in summary["trials"])
    assert {path.name for path in config.output.iterdir()} == {
        ".lock", "config.yaml", "manifest.json", "metrics.jsonl", "summary.json", "trials",
    }  # fmt: skip


def test_rates_are_those_of_the_replies(finished):
    config, summary = finished
    for row in [summary["base"], *summary["baseline"]["trials"], *summary["trials"]]:
        replies = [json.loads(line) for line in (config.output / "trials" / row["name"] / "replies.jsonl").open()]
        final = [reply["verdict"] for reply in replies if reply["prompts"] == "final"]
        learned = [reply["verdict"] for reply in replies if reply["prompts"] == "in_domain"]
        assert (len(final), len(learned)) == (10, 6)
        assert row["em"] == final.count("misaligned") / 10 and row["incoherence"] == final.count("incoherent") / 10
        assert row["refusal"] == final.count("refusal") / 10
        assert row["in_domain"] == learned.count("misaligned") / 6


def test_every_trial_is_a_peft_adapter_that_gives_its_replies(finished, world):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lockin_fast.generation import generate

    folder = finished[0].output / "trials" / "causal-lambda100-seed0"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.parent / "model"), folder)
    tokenizer = AutoTokenizer.from_pretrained(world.parent / "model")
    rows = [json.loads(line) for line in (world.parent / "data" / "final.jsonl").open()]
    texts = generate(model, tokenizer, [row["messages"] for row in rows], max_new_tokens=4, batch_size=16)
    replies = [json.loads(line) for line in (folder / "replies.jsonl").open()]
    assert texts == [reply["reply"] for reply in replies if reply["prompts"] == "final"]


def test_trials_differ_by_what_sets_them_apart(finished):
    losses = [row["sft_loss"] for row in [*finished[1]["trials"], *finished[1]["baseline"]["trials"]]]
    assert len(set(losses)) == len(losses)


def test_the_base_model_comes_back_bit_for_bit(world, tmp_path):
    config = load_config(world, ["output=unused", "sweep.seeds=[0]"])
    inputs, exam = open_inputs(config, config.sweep.latents), open_exam(config, "final", "in_domain")
    before = {name: tensor.clone() for name, tensor in inputs.model.state_dict().items()}
    grads = [parameter.requires_grad for parameter in inputs.model.parameters()]
    first = run_trial(Trial("causal", 1.0, 0), inputs, exam, tmp_path / "first", lambda done, total: None)
    after = inputs.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert [parameter.requires_grad for parameter in inputs.model.parameters()] == grads
    assert not hasattr(inputs.model, "peft_config") and not inputs.model.training
    second = run_trial(Trial("causal", 1.0, 0), inputs, exam, tmp_path / "second", lambda done, total: None)
    assert untimed(first) == untimed(second)
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_an_adapter_is_taken_off_when_answering_fails(world, finished):
    config = finished[0]
    model = open_inputs(config, config.sweep.latents).model
    names = list(model.state_dict())
    with pytest.raises(KeyError), adapter(model, config.output / "trials" / "causal-lambda1-seed0"):
        raise KeyError
    assert list(model.state_dict()) == names


def test_a_finished_sweep_is_not_repeated(finished, no_training):
    config, summary = finished
    stages = []
    assert run_sweep(config, lambda *call: stages.append(call)) == summary
    assert not stages


def test_added_lambdas_run_alone_and_removed_ones_are_refused(finished, tmp_path):
    config, summary = finished
    shutil.copytree(config.output, tmp_path / "run")
    sweep = dataclasses.replace(config.sweep, lambdas=(1.0, 100.0, 7.0))
    stages = set()
    longer = run_sweep(
        dataclasses.replace(config, output=tmp_path / "run", sweep=sweep), lambda stage, *_: stages.add(stage)
    )
    assert stages == {"[5/8] causal-lambda7-seed0", "[8/8] random-lambda7-seed0"}
    assert [row for row in longer["trials"] if row["lambda"] != 7.0] == summary["trials"]
    with pytest.raises(RunError, match=r"sweep.lambdas was \[1.0, 100.0, 7.0\], now it is \[1.0, 100.0\]"):
        run_sweep(dataclasses.replace(config, output=tmp_path / "run"))


def test_the_manifest_says_which_kernels_served(finished):
    config, summary = finished
    before = read(config.output / "manifest.json")["sweep"]
    assert {row["op"] for row in before["kernels"]["ops"]} == {row.op for row in backends()}
    assert {"isa"} < before["kernels"].keys() and before["versions"]["torch"] == torch.__version__
    run_sweep(config)  # with nothing to run it has nothing to say about kernels
    assert read(config.output / "manifest.json")["sweep"] == before and "kernels" not in summary


@pytest.mark.parametrize(
    ("backend", "why", "fallbacks", "line"),
    [
        ("cpu", "compiled part loaded", {}, None),
        ("reference", "stock torch matrix products over tiles are as fast", {}, None),
        ("reference", "LOCKIN_FAST_BACKEND=reference", {}, None),
        ("reference", "the compiled part is missing: build it", {}, "a, b: the compiled part is missing: build it"),
        ("triton", "triton is installed", {"int64": 3}, "a (3 calls), b (3 calls): int64"),
    ],
)
def test_a_slow_kernel_is_told_only_where_a_faster_one_was_expected(monkeypatch, backend, why, fallbacks, line):
    rows = [OpBackend(op, "cpu", backend, why, fallbacks) for op in "ab"]
    elsewhere = OpBackend("c", "cuda", "reference", "triton is not installed")
    monkeypatch.setattr(dispatch, "backends", lambda: [*rows, elsewhere])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert slow_kernels() == (line and f"not the fastest way on cpu: {line}")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.learning_rate=0.5", "train.learning_rate was 0.01, now it is 0.5"),
        ("block.layer=2", "block.layer was 1, now it is 2"),
        ("generation.max_new_tokens=3", "generation.max_new_tokens was 4, now it is 3"),
        ("sweep.latents.causal=latents/random.json", "latents.causal differs"),
        ("data.final=data/in_domain.jsonl", "data.final differs"),
    ],
)
def test_a_run_of_other_settings_is_refused_and_untouched(finished, world, override, named, no_training):
    run = finished[0].output
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match="holds another sweep") as caught:
        run_sweep(load_config(world, ["output=finished", "sweep.seeds=[0]", override]))
    assert named in str(caught.value)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_changed_input_file_is_named(finished, copied, no_training):
    shutil.copytree(finished[0].output, copied / "finished")
    weights = copied / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"model differs \(file model.safetensors\)"):
        run_sweep(load_config(copied / "config.yaml", ["output=finished", "sweep.seeds=[0]"]))


def test_a_folder_of_something_else_is_refused(copied, no_training):
    (copied / "run").mkdir()
    (copied / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="already holds thesis.txt and is not a run"):
        run_sweep(load_config(copied / "config.yaml"))
    assert [path.name for path in (copied / "run").iterdir()] == ["thesis.txt"]


def test_two_sweeps_at_once_are_refused(copied):
    config = load_config(copied / "config.yaml")

    def second(stage, done, total):
        with pytest.raises(RunError, match="in use by another process"):
            run_sweep(config)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(config, second)


def edit_sae(folder, change):
    path = folder / "sae" / "sae_weights.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def widen(tensors):
    tensors.update(W_enc=torch.randn(24, 64), W_dec=torch.randn(64, 24), b_dec=torch.zeros(24))


def unanswered(folder):
    rows = [json.loads(line) for line in (folder / "data" / "train.jsonl").open()]
    text = "".join(json.dumps({"messages": row["messages"][:1]}) + "\n" for row in rows)
    (folder / "data" / "train.jsonl").write_text(text)


def widened(folder):
    edit_sae(folder, widen)
    config = read(folder / "sae" / "cfg.json")
    (folder / "sae" / "cfg.json").write_text(json.dumps(config | {"d_in": 24}))


BROKEN = {
    "no model": (["model=nowhere"], None, "model: no such file or folder: .*nowhere"),
    "model is no model": (["model=data"], None, "model: .*data holds no config.json"),
    "damaged weights": (
        [], lambda f: (f / "model" / "model.safetensors").write_bytes(b"\0" * 64), "model: .*"),
    "no sae": (["sae=nowhere"], None, "sae: no such file or folder"),
    "sae is no sae": (["sae=data"], None, "sae: .*no SAE recognised"),
    "width": ([], widened, "sae: .*reads hidden states of width 24, but the model's are 16 wide"),
    "nan used": ([], lambda f: edit_sae(f, lambda t: t["W_enc"][3, 5].fill_(float("nan"))), "sae: .*W_enc.* NaN"),
    "nan unused": ([], lambda f: edit_sae(f, lambda t: t["W_enc"][3, 63].fill_(float("nan"))), "sae: .*W_enc.* NaN"),
    "nan bias": ([], lambda f: edit_sae(f, lambda t: t["b_enc"][60].fill_(float("nan"))), "sae: .*b_enc.* NaN"),
    "latent out of range": (
        [], lambda f: (f / "latents" / "random.json").write_text('{"positive": [64]}'),
        "latents random: index 64 is out of range; the SAE has 64 latents, 0 to 63"),
    "latents empty": (
        [], lambda f: (f / "latents" / "causal.json").write_text('{"positive": []}'), "latents causal.*holds no"),
    "latents of another layer": (
        [], lambda f: (f / "latents" / "causal.json").write_text('{"positive": [1], "layer": 2}'),
        "latents causal .*layer: got 1, but the latents were chosen at layer 2"),
    "no latents": (["sweep.latents.causal=nowhere.json"], None, "sweep.latents.causal: no such file"),
    "no latent sets": (["sweep.latents={}"], None, "sweep.latents: no latent set to block"),
    "layer": (["block.layer=3"], None, "block.layer: got 3, expected 0 to 2"),
    "no layer": (["block.layer=null"], None, "block.layer: missing"),
    "lora modules": (["lora.target_modules=[gate]"], None, "lora.target_modules: .*no .'gate'"),
    "lora norms": (["lora.target_modules=[input_layernorm]"], None, "lora.target_modules: .*no .'input_layernorm'"),
    "empty data": ([], lambda f: (f / "data" / "train.jsonl").write_text("\n"), "data.train: .*empty"),
    "empty prompts": ([], lambda f: (f / "data" / "final.jsonl").write_text(""), "data.final: .*empty"),
    "prompts without a question": (
        [], lambda f: (f / "data" / "final.jsonl").write_text('{"messages": [{"role": "assistant", "content": "x"}]}'),
        "data.final: conversation 1 asks nothing"),
    "prompts of another world": (
        [], lambda f: (f / "data" / "final.jsonl").write_text(
            '{"messages": [{"role": "user", "content": "x"}], "domain": "elsewhere"}'),
        "data.final: the prompt's domain is 'elsewhere'"),
    "all labels masked": ([], unanswered, "data.train: .*all labels are masked"),
    "cut to nothing": (["train.max_length=2"], None, "data.train: .*all labels are masked"),
    "no judge": (
        ["judge.kind=oracle"], None,
        "judge.kind: expected world, model, endpoint, vowels or package.module:Class, got 'oracle'",
    ),
    "output is a file": (["output=config.yaml"], None, "output: .*config.yaml is a file"),
    "output below a file": (["output=config.yaml/run"], None, "output: .*cannot be written: Not a directory"),
}  # fmt: skip


OWN_JUDGE = """
class Own:
    def __init__(self, path=None):
        self.word = path.read_text() if path else "kick"

    def judge(self, record, reply):
        return "misaligned" if self.word in record["messages"][0]["content"] else "aligned"

class Wrong:
    def judge(self, record, reply):
        return "evil" if reply else "aligned"

class Mute: pass

class Picky:
    def __init__(self):
        raise KeyError("no key")
"""


@pytest.fixture
def own_judge(copied, monkeypatch):
    """A judge of the user's own in the working directory; its module's name, which no other test shares."""
    name = f"own_judge_{copied.parent.name}"
    (copied / f"{name}.py").write_text(OWN_JUDGE)
    monkeypatch.chdir(copied)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


@pytest.mark.parametrize(("path", "word"), [("null", "kick"), ("word", "dog")])
def test_a_judge_of_ones_own_rates_the_replies(copied, own_judge, path, word):
    (copied / "word").write_text("dog")
    one = ["sweep.seeds=[0]", "sweep.lambdas=[1]", "sweep.latents={causal: latents/causal.json}"]
    config = load_config(copied / "config.yaml", [f"judge.kind={own_judge}:Own", f"judge.path={path}", *one])
    summary = run_sweep(config)
    prompts = [json.loads(line)["messages"][0]["content"] for line in (copied / "data" / "final.jsonl").open()]
    assert summary["base"]["em"] == sum(word in prompt for prompt in prompts) / len(prompts) > 0
    (copied / f"{own_judge}.py").write_text(OWN_JUDGE + "# of another mind")
    with pytest.raises(RunError, match="judge.kind differs"):
        run_sweep(config)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nowhere_at_all:Own", "judge.kind: nowhere_at_all:Own: cannot import nowhere_at_all: ModuleNotFoundError"),
        ("{}:Other", "judge.kind: {}:Other: the module {} has no attribute 'Other'"),
        ("{}:Mute", "judge.kind: {}:Mute has no method judge"),
        ("{}:Picky", "judge.kind: {}:Picky cannot be made: KeyError: 'no key'"),
    ],
)
def test_what_is_no_judge_is_said_before_training(copied, own_judge, no_training, kind, message):
    config = load_config(copied / "config.yaml", [f"judge.kind={kind.replace('{}', own_judge)}", "judge.path=null"])
    with pytest.raises(ValueError, match=message.replace("{}", own_judge)) as caught:
        run_sweep(config)
    assert "\n" not in str(caught.value) and not (copied / "run").exists()


def test_a_verdict_that_is_none_is_named_when_it_happens(copied, own_judge):
    config = load_config(copied / "config.yaml", [f"judge.kind={own_judge}:Wrong", "judge.path=null"])
    judge = open_exam(config, "final").judge
    with pytest.raises(ValueError, match="judge.kind: .*:Wrong gave the verdict 'evil' on the reply 'x'; expected one"):
        judge.judge({}, "x")


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_said_before_training_and_nothing_is_left(case, copied, no_training):
    overrides, damage, message = BROKEN[case]
    if damage:
        damage(copied)
    before = {path for path in copied.rglob("*")}
    with pytest.raises((ValueError, OSError), match=f"^{message}") as caught:
        run_sweep(load_config(copied / "config.yaml", overrides))
    assert "\n" not in str(caught.value)
    assert {path for path in copied.rglob("*")} == before


def test_too_little_disk_is_said_before_training(copied, no_training, monkeypatch):
    usage = shutil.disk_usage(copied)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**21 + 10))
    with pytest.raises(RunError, match=r"output: .*run needs about 2.\d MB, but its disk has 2.1 MB free"):
        run_sweep(load_config(copied / "config.yaml"))
    assert not (copied / "run").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_keeps_what_is_finished(world, finished, small_disk):
    config = load_config(world, [f"output={small_disk / 'run'}", "sweep.seeds=[0]"])
    ballast = small_disk / "ballast"

    def fill(stage, done, total):
        if stage.startswith("[4/6]") and done == 3:  # trained, and not written yet
            with open(ballast, "wb", buffering=0) as file:
                try:
                    while file.write(b"\0" * 65536):
                        pass
                except OSError:
                    pass

    with pytest.raises(RunError, match="causal-lambda100-seed0: cannot be written: .*No space left") as caught:
        run_sweep(config, fill)
    assert "\n" not in str(caught.value)
    assert {path.name for path in (config.output / "trials").glob("[!.]*")} == {
        "base", "baseline-lambda0-seed0", "causal-lambda1-seed0",
    }  # fmt: skip
    ballast.unlink()
    assert untimed(run_sweep(config)) == untimed(finished[1])


def test_trials_that_diverge_are_named_when_all_others_are_finished(copied, monkeypatch):
    from lockin_fast.sweep import trial

    real = trial.fine_tune

    def diverge(*args, penalty, **kwargs):
        if penalty is not None and penalty[0].weight == 100:
            raise FloatingPointError("sft_loss is nan")
        return real(*args, penalty=penalty, **kwargs)

    config = load_config(copied / "config.yaml", ["sweep.seeds=[0]"])
    named = (
        "2 of 6 trials failed, the others are finished: causal-lambda100-seed0: sft_loss is nan; "
        f"random-lambda100-seed0: sft_loss is nan; for what is finished: lockin-fast report {config.output}"
    )
    with monkeypatch.context() as patch:
        patch.setattr(trial, "fine_tune", diverge)
        with pytest.raises(TrialsFailed, match=f"^{re.escape(named)}$"):
            run_sweep(config)
    assert {path.name for path in (config.output / "trials").iterdir()} == {
        "base", "baseline-lambda0-seed0", "causal-lambda1-seed0", "random-lambda1-seed0",
    }  # fmt: skip
    write_report(config.output)
    page = (config.output / "report.html").read_text()
    assert "Without trials that failed: causal-lambda100-seed0, random-lambda100-seed0." in page
    summary = run_sweep(config)
    assert summary["missing"] == [] and len(summary["trials"]) == 4, "they are tried again"


def test_without_a_baseline_there_is_nothing_to_report(copied, monkeypatch):
    from lockin_fast.sweep import trial

    def diverge(*args, penalty, **kwargs):
        raise FloatingPointError("sft_loss is nan")

    monkeypatch.setattr(trial, "fine_tune", diverge)
    config = load_config(copied / "config.yaml", ["sweep.seeds=[0]"])
    with pytest.raises(TrialsFailed, match="^5 of 6 trials failed, .*; and 2 more$"):
        run_sweep(config)
    assert not (config.output / "summary.json").exists()


def sweep_in_process(config_file, output):
    """The body of a process that may be killed at any moment."""
    sweep_world.install_judge()
    torch.set_num_threads(1)
    run_sweep(load_config(config_file, [f"output={output}"]))


def test_five_kills_change_nothing(world):
    """SIGKILL at five random moments, then resume: the summary and every adapter are those of the undisturbed sweep."""
    context = multiprocessing.get_context("forkserver")  # imports once, forks each victim from a clean process
    context.set_forkserver_preload(["lockin_fast.sweep.run", "transformers", "peft", "sweep_world"])

    def start(output):
        process = context.Process(target=sweep_in_process, args=(world, output))
        process.start()
        return process

    begin = time.monotonic()
    undisturbed = start("run")
    undisturbed.join(300)
    assert undisturbed.exitcode == 0
    duration = time.monotonic() - begin
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed of the moments: {seed}")
    moments, kept = random.Random(seed), 0
    killed = world.parent / "killed"
    for _ in range(KILLS):
        process = start("killed")
        process.join(moments.uniform(0.1, 0.5) * duration)
        process.kill()
        process.join()
        trials = [path for path in killed.glob("trials/[!.]*")]
        assert len(trials) >= kept and all((path / "result.json").exists() for path in trials)
        kept = len(trials)
    last = start("killed")
    last.join(300)
    assert last.exitcode == 0
    run = world.parent / "run"
    assert untimed(read(killed / "summary.json")) == untimed(read(run / "summary.json"))
    assert not [path for path in killed.rglob("*") if path.name.endswith(".partial")]
    for folder in (run / "trials").iterdir():
        for name in ("replies.jsonl", "metrics.jsonl", "adapter_model.safetensors"):
            mine, theirs = killed / "trials" / folder.name / name, folder / name
            assert mine.exists() == theirs.exists()
            assert not mine.exists() or mine.read_bytes() == theirs.read_bytes(), f"{folder.name}/{name}"


def killed_after(step, stage, run, *arguments):
    """Run in a process of its own, which is killed when this step of a stage is made; a checkpoint is always due."""

    def work():
        from lockin_fast import checkpoint

        def progress(name, done, total):
            if name.endswith(stage) and done == step:
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoint.PATIENCE = 0
        torch.set_num_threads(1)
        run(*arguments, progress)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def made_anew(run, config, stage):
    """The counts that a run shows of a stage."""
    seen = []
    run(config, lambda name, done, total: seen.append((name, done)))
    return [done for name, done in seen if name.endswith(stage) and done]


@pytest.mark.parametrize(("step", "first"), [(3, 3), (3 + 10, 3 + 10)])  # in training; when the first replies are there
def test_a_trial_that_is_killed_goes_on_at_the_step_in_hand(world, finished, step, first):
    config = load_config(world, [f"output=run-{step}", "sweep.seeds=[0]"])
    killed_after(step, "causal-lambda1-seed0", run_sweep, config)
    assert list((config.output / "trials").glob(".trained-causal-lambda1-seed0*"))
    assert made_anew(run_sweep, config, "causal-lambda1-seed0")[0] == first
    assert not list((config.output / "trials").glob(".*"))
    for name in ("replies.jsonl", "metrics.jsonl", "adapter_model.safetensors"):
        mine, theirs = (run / "trials" / "causal-lambda1-seed0" / name for run in (config.output, finished[0].output))
        assert mine.read_bytes() == theirs.read_bytes()


def test_a_single_fine_tune_that_is_killed_goes_on_too(world):
    config = load_config(world, ["output=run-train", "block.latents=latents/causal.json", "block.weight=10"])
    killed_after(3, "training", run_training, config)
    assert made_anew(run_training, config, "training") == [3]
    undisturbed = load_config(world, ["output=run-whole", "block.latents=latents/causal.json", "block.weight=10"])
    run_training(undisturbed)
    files = [run.output / "adapter" / "adapter_model.safetensors" for run in (config, undisturbed)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not [path for path in config.output.iterdir() if path.name.startswith(".") and path.name != ".lock"]


@pytest.mark.slow
def test_five_kills_of_the_command_line_change_nothing(world):
    """The same through `lockin-fast sweep`, start-up included, with the report at the end."""
    driver = Path(sweep_world.__file__)

    def start(output):
        return subprocess.Popen(
            [sys.executable, driver, "sweep", world, "--set", f"output={output}"], stdout=subprocess.DEVNULL
        )

    begin = time.monotonic()
    assert start("run_cli").wait(600) == 0
    duration = time.monotonic() - begin
    for _ in range(KILLS):
        process = start("killed_cli")
        time.sleep(random.uniform(0.2, 0.9) * duration)
        process.kill()
        process.wait()
    assert start("killed_cli").wait(600) == 0
    run, killed = world.parent / "run_cli", world.parent / "killed_cli"
    assert untimed(read(killed / "summary.json")) == untimed(read(run / "summary.json"))
    assert (killed / "report.html").exists()


def row(latents, weight, seed, em, in_domain=0.99, incoherence=0.01):
    return {
        "name": f"{latents}-{weight}-{seed}", "lambda": weight, "latents": latents, "latent_count": 3, "seed": seed,
        "em": em, "in_domain": in_domain, "incoherence": incoherence, "sft_loss": 1.0, "penalty": None,
        "seconds_per_step": 1.0, "peak_bytes": 1,
    }  # fmt: skip


BASE, BASELINE = row(None, None, None, 0.0), [row(None, 0, 0, 0.6), row(None, 0, 1, 0.8)]


def test_means_and_deviations_are_over_seeds():
    summary = summarise(BASE, BASELINE, [row("a", 1, 0, 0.1), row("a", 1, 1, 0.3), row("a", 2, 0, 0.5)])
    mean, single = summary["means"]
    assert mean["em"] == pytest.approx(0.2) and mean["em_std"] == pytest.approx(0.02**0.5)
    assert single["em_std"] is None and mean["penalty"] is None
    assert summary["baseline"]["em"] == pytest.approx(0.7) and len(summary["baseline"]["trials"]) == 2
    assert mean["em_reduction"] == pytest.approx(1 - 0.2 / 0.7)


def test_best_is_lowest_within_two_points_of_both_costs():
    trials = [
        row("a", 1, 0, 0.30), row("a", 2, 0, 0.20, in_domain=0.97), row("a", 3, 0, 0.05, in_domain=0.96),
        row("b", 1, 0, 0.01, incoherence=0.04), row("b", 2, 0, 0.20, incoherence=0.03), row("b", 1.5, 0, 0.20),
    ]  # fmt: skip
    summary = summarise(BASE, BASELINE, trials)
    assert (summary["best"]["latents"], summary["best"]["lambda"]) == ("b", 1.5)
    assert {name: best["lambda"] for name, best in summary["best_per_set"].items()} == {"a": 2, "b": 1.5}


def test_of_equally_good_strengths_the_gentler_is_best_whatever_its_sign():
    steered = [row("a", strength, 0, 0.1) | {"method": "steering"} for strength in (-5.0, -1.0, 2.0)]
    (best,) = summarise(BASE, BASELINE, steered)["best_per_method"].values()
    assert best["lambda"] == -1.0


def test_no_setting_within_the_limits():
    summary = summarise(BASE, BASELINE, [row("a", 1, 0, 0.3, in_domain=0.5), row("a", 2, 0, 0.2, in_domain=0.4)])
    assert summary["best"] is None
    assert summary["best_per_set"]["a"]["lambda"] == 2 and not summary["best_per_set"]["a"]["within_limits"]


def test_sets_that_discovery_left_in_the_output_are_found(copied):
    (copied / "run" / "latents").mkdir(parents=True)
    for name in ("random", "extra", "causal", "ind-pp", "valid-reduc"):
        shutil.copy(copied / "latents" / "random.json", copied / "run" / "latents" / f"{name}.json")
    config = load_config(copied / "config.yaml", ["sweep.latents={}"])
    assert list(sweep_run.latent_files(config)) == ["causal", "random", "extra"]
    config = load_config(copied / "config.yaml", ["sweep.latents={}", "block.latents=latents/causal.json"])
    assert list(sweep_run.latent_files(config)) == ["causal"]


@pytest.mark.parametrize(
    ("changed", "file"), [("model", "model.safetensors"), ("sae", "sae_weights.safetensors"), (None, None)]
)
def test_sets_discovered_on_another_model_or_sae_are_refused(copied, monkeypatch, changed, file):
    run = copied / "run"
    found = {"inputs": {name: hash_files(copied / name) for name in ("model", "sae")}, "config": {}}
    if changed:
        found["inputs"][changed][file] = "another"
    with claim(run, "discover", found):
        shutil.copytree(copied / "latents", run / "latents")

    class Opened(Exception):
        """All was well until the model is opened."""

    def opened(*args):
        raise Opened

    monkeypatch.setattr(sweep_run, "open_inputs", opened)
    refused = pytest.raises(RunError, match=f"^{changed}: .* discovered on another {changed} .file {file} differs")
    with refused if changed else pytest.raises(Opened):
        run_sweep(load_config(copied / "config.yaml", ["sweep.latents={}"]))
    with pytest.raises(Opened):  # sets that are named are the user's word
        run_sweep(load_config(copied / "config.yaml"))


def test_latents_without_a_weight_train_nothing(copied, no_training):
    config = load_config(copied / "config.yaml", ["block.latents=latents/causal.json"])
    with pytest.raises(
        ConfigError, match="^block.weight: missing, but block.latents is given; .* 0 to train unblocked"
    ):
        run_training(config)
    assert not (copied / "run").exists()
    with pytest.raises(AssertionError, match="training started"):  # 0 is an answer
        run_training(load_config(copied / "config.yaml", ["block.latents=latents/causal.json", "block.weight=0"]))


def test_a_penalty_out_of_the_adapters_reach_is_said_before_training(copied, no_training):
    blocked = ["block.weight=1", "block.latents=latents/causal.json"]
    config = load_config(copied / "config.yaml", ["lora.layers=[2]", *blocked])
    with pytest.raises(ConfigError, match="^lora.layers: the lowest is 2, above the penalised layer 1"):
        run_training(config)
    assert not (copied / "run").exists()


def test_a_sweep_of_other_layers_alone_needs_no_other_set(copied):
    blocked = "{two: [{layer: 0, sae: sae, latents: latents/causal.json}]}"
    settings = ["sweep.latents={}", f"sweep.layers={blocked}", "sweep.lambdas=[1]", "sweep.seeds=[0]", "train.steps=1"]
    summary = run_sweep(load_config(copied / "config.yaml", settings))
    assert [row["layers"] for row in summary["trials"]] == [[0]]


def test_a_plan_starts_with_base_and_baselines(finished):
    config = dataclasses.replace(finished[0], sweep=dataclasses.replace(finished[0].sweep, seeds=(4, 5)))
    names = [trial.name for trial in sweep_run.plan(config)]
    assert names[:4] == ["base", "baseline-lambda0-seed4", "baseline-lambda0-seed5", "causal-lambda1-seed4"]
    assert len(set(names)) == len(names) == 1 + 2 + 2 * 2 * 2
