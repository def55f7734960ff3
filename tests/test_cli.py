"""The command line: help, one-line errors with exit codes, and the output of the commands."""

import json
import os
import re
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import sweep_world
import torch

from lockin_fast import cli, doctor

COMMANDS = ("doctor", "organism", "cache", "discover", "plan", "train", "sweep", "patch", "measure", "report", "demo")


pytestmark = pytest.mark.usefixtures("vowel_judge", "one_thread")


@pytest.fixture
def command(capsys):
    """Run a command in this process: (exit status, stdout, stderr)."""

    def run(*words):
        status = cli.main([str(word) for word in words])
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example(command, name):
    status, out, _ = command(name, "--help")
    assert status == 0 and f"Example: lockin-fast {name}" in " ".join(out.split())


def test_without_arguments_the_commands_are_listed(command):
    status, out, _ = command()
    assert status == 0 and all(name in out for name in COMMANDS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["swep"], "No such command 'swep'"),
        (["sweep"], "Missing argument 'CONFIG'"),
        (["demo", "--bogus"], "No such option: --bogus"),
        (["report", "one", "other"], "give one RUN, or RUN --beside OTHER..."),
        (["report", "one", "--beside"], "give one RUN, or RUN --beside OTHER..."),
        (["demo", "--seeds", "none"], "Invalid value for '--seeds'"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(command, words, message):
    status, out, err = command(*words)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and message in err and err.count("\n") == 1 and "--help" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep", "{folder}/none.yaml"], "none.yaml: no such configuration file"),
        (["sweep", "{config}", "--set", "train.stebs=3"], "train.stebs: unknown key; did you mean train.steps?"),
        (["sweep", "{config}", "--set", "sae=nowhere"], "sae: no such file or folder"),
        (["train", "{config}", "--set", "output=null"], "output: missing"),
        (["report", "{folder}"], "no summary.json in it"),
        (["report", "{folder}", "--beside", "{folder}/other"], "no summary.json in it"),
    ],
)
def test_errors_are_one_line_and_status_1(command, world, words, message):
    status, out, err = command(*(word.format(config=world, folder=world.parent) for word in words))
    assert (status, out) == (1, "")
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not (world.parent / "run").exists()


def test_debug_shows_the_traceback(world):
    with pytest.raises(ValueError, match="unknown key"):
        cli.main(["sweep", str(world), "--set", "oops=3", "--debug"])


def test_a_surprise_is_named_as_one(command, monkeypatch):
    monkeypatch.setattr(doctor, "diagnose", lambda: {}["lost"])
    status, _, err = command("doctor")
    assert status == 1 and "KeyError: 'lost' (unexpected; --debug shows where)" in err and err.count("\n") == 1


def test_an_interrupt_says_how_to_go_on(command, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "diagnose", interrupt)
    status, _, err = command("doctor")
    assert status == 130 and "goes on where it stood" in err


INTERRUPTED_IMPORT = """
import os, signal, sys
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background is born deaf to it
sys.meta_path.insert(0, Stop())
from lockin_fast.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("module", ["lockin_fast.cli", "typer", "torch"])
def test_an_interrupt_while_it_starts_is_one_line(module):
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_IMPORT, module], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted before anything began\n")


def test_a_warning_of_ours_is_one_line(command, monkeypatch):
    def diagnose():
        warnings.warn_explicit("state.before is damaged", UserWarning, str(Path(cli.__file__).with_name("train.py")), 1)
        warnings.warn_explicit("somebody else's", UserWarning, "elsewhere.py", 7)
        return [doctor.Finding("machine", "python", "3")]

    monkeypatch.setattr(doctor, "diagnose", diagnose)
    with pytest.warns(UserWarning, match="somebody else's"):
        status, _, err = command("doctor")
    assert (status, err) == (0, "warning: state.before is damaged\n")


def test_a_sweep_prints_its_table_headline_and_files(command, world):
    words = ("--set", "output=swept", "--set", "sweep.seeds=[0]", "--set", "sweep.lambdas=[10]")
    status, out, err = command("sweep", world, *words)
    assert (status, err) == (0, "")
    assert "\x1b" not in out and "\r" not in out  # no bars and no colours in a pipe
    lines = out.splitlines()
    stages = [line for line in lines if re.match(r"  \[\d/4\] .*: \d+\.\d s$", line)]
    assert [re.sub(r":.*", "", line).strip() for line in stages] == [
        "[1/4] base", "[2/4] baseline-lambda0-seed0", "[3/4] causal-lambda10-seed0", "[4/4] random-lambda10-seed0",
    ]  # fmt: skip
    summary = json.loads((world.parent / "swept" / "summary.json").read_text())
    rate = f"{100 * summary['trials'][0]['em']:.1f}%"
    assert any(re.match(rf"causal \(4\) +10 +{rate}", line) for line in lines)
    assert f"report:  {world.parent / 'swept' / 'report.html'}" in lines
    assert (world.parent / "swept" / "figures" / "sweep.png").stat().st_size > 10_000

    (world.parent / "swept" / "report.html").unlink()
    status, out, err = command("report", world.parent / "swept")
    assert (status, err) == (0, "") and (world.parent / "swept" / "report.html").exists()

    status, again, _ = command("sweep", world, *words)
    assert status == 0 and "[1/4]" not in again

    shutil.copytree(world.parent / "swept", world.parent / "swept again")
    status, out, err = command("report", world.parent / "swept", "--beside", world.parent / "swept again")
    assert (status, err) == (0, "") and max(map(len, out.splitlines()[:7])) <= 100
    assert re.search(r"^run +seeds +EM .* random\nswept +1 .*\nswept again +1 .*\nmean of the others ", out, re.M)
    assert "swept again" in command("report", world.parent / "swept")[1]
    assert ">swept again<" in (world.parent / "swept" / "report.html").read_text()


def test_libraries_keep_quiet_when_models_are_read_and_written(world, tmp_path):
    code = """
import sys, lockin_fast.cli as cli
cli._quiet_libraries()
from transformers import AutoModelForCausalLM
from lockin_fast.lora import LoraSettings, borrowed_with_lora, save_adapter
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.save_pretrained(sys.argv[2] + "/model")
with borrowed_with_lora(model, LoraSettings(r=2), 0) as adapted:
    save_adapter(adapted, sys.argv[2] + "/adapter")
"""
    command = [sys.executable, "-c", code, world.parent / "model", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_train_writes_an_adapter_and_says_what_the_papers_layer_is(command, world):
    words = ["train", world]
    for setting in ("output=trained", "block_latents_path=latents/causal.json", "block_layer=2", "block_lambda=10"):
        words += ["--set", setting]
    status, out, err = command(*words)
    assert (status, err) == (0, "")
    assert "note: block_layer 2 is hidden_states[2], the output of model.layers[1]" in out
    result = json.loads((world.parent / "trained" / "adapter" / "result.json").read_text())
    assert result["penalty"] > 0 and result["lambda"] == 10
    assert (world.parent / "trained" / "adapter" / "adapter_model.safetensors").exists()
    status, _, err = command(*words, "--set", "block_lambda=20")
    assert status == 1 and "block.weight was 10.0, now it is 20.0" in err
    adapter = (world.parent / "trained" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert command(*words)[0] == 0
    assert (world.parent / "trained" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_the_demo_runs_its_steps_in_one_run_directory(command, tmp_path, monkeypatch):
    """The real sweep and report between an organism and a discovery that are stood in for by the test's world."""
    asked = {}

    def build(out, *, seed, progress):
        asked["seed"] = seed
        if not out.exists():
            out.mkdir(parents=True)
            sweep_world.build_world(out)
            text = (out / "config.yaml").read_text()
            (out / "config.yaml").write_text(re.sub(r"  latents:\n.*\n.*\n", "", text))

    def discover(config, progress):
        progress("screen", 0, 2)
        progress("screen", 2, 2)
        (config.output / "latents").mkdir(exist_ok=True)
        for name in ("random", "causal"):
            latents = (config.model.parent / "latents" / f"{name}.json").read_bytes()
            (config.output / "latents" / f"{name}.json").write_bytes(latents)

    monkeypatch.setitem(sys.modules, "lockin_fast.organism", types.SimpleNamespace(build=build))
    monkeypatch.setitem(sys.modules, "lockin_fast.discovery", types.SimpleNamespace(discover=discover))
    out_folder = tmp_path / "a: strange # name"
    status, out, err = command("demo", "--out", out_folder, "--seed", 7, "--seeds", 2, "--small")
    assert (status, err, asked) == (0, "", {"seed": 7})
    assert out.startswith(f"From nothing to a blocked fine-tune in {out_folder}: about ") and "minutes" in out[:300]
    assert "\nnext:    your own model" in out
    for number in range(1, 5):
        assert re.search(rf"^{number}/4 \w+: .*\n(.*\n)*?  took \d+ s$", out, re.M)
    assert re.search(r"^  screen: \d+\.\d s$", out, re.M)
    summary = json.loads((out_folder / "summary.json").read_text())
    assert {(row["latents"], row["lambda"], row["seed"]) for row in summary["trials"]} == {
        (name, weight, seed) for name in ("causal", "random") for weight in (1e3, 1e4) for seed in (0, 1)
    }
    assert {"config.yaml", "manifest.json", "metrics.jsonl", "summary.json", "figures", "report.html", "trials"} <= {
        path.name for path in out_folder.iterdir()
    }
    status, _, err = command("demo", "--out", out_folder, "--seed", 8, "--seeds", 2, "--small")
    assert status == 1 and "holds another demo: seed was 7, now it is 8" in err


def test_doctor_names_every_op_and_is_honest_about_gpus(command, monkeypatch, tmp_path):
    import lockin_fast
    from lockin_fast.kernels import gpu

    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    (tmp_path / "block_penalty.csv").write_text("op,device,commit\nblock_penalty,cpu,abc\n")
    (tmp_path / "gpu_of_another_kind.csv").write_text("price\n3\n")
    status, out, err = command("doctor")
    assert (status, err) == (0, "")
    for row in lockin_fast.backends():
        assert f"{row.op} on {row.device}" in out and row.why in out
    assert "no kernel of this project has ever run on a GPU" in out and torch.__version__ in out
    never = "never run on a GPU, in triton: .*({})(,|$)"
    assert re.search(never.format("block_penalty"), out, flags=re.MULTILINE)
    rows = ["op,backend,gpu,commit", *(f"{op},triton,NVIDIA H100,abc" for op in ("latent_stats", "block_penalty"))]
    (tmp_path / "gpu_suite.csv").write_text("\n".join([*rows, rows[-1], "encode_latents,triton,,abc"]))
    out = command("doctor")[1]
    line = "block_penalty (triton), latent_stats (triton) on NVIDIA H100 at commit abc"
    assert f"{line} (benchmarks/results/gpu_suite.csv)" in out
    assert "ever run on a GPU, by" not in out
    assert not re.search(never.format("block_penalty|latent_stats"), out, flags=re.MULTILINE)
    assert re.search(never.format("encode_latents"), out, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("LOCKIN_FAST_CPU_ISA", "LOCKIN_FAST_CPU_ISA=wrong cannot be served; this processor runs: baseline"),
        ("LOCKIN_FAST_BACKEND", "LOCKIN_FAST_BACKEND is 'wrong'; expected one of reference"),
    ],
)
def test_doctor_names_a_wrong_environment_and_fails(variable, message):
    if variable == "LOCKIN_FAST_CPU_ISA":
        pytest.importorskip("lockin_fast._native", reason="the compiled part is absent")
    command = [sys.executable, "-m", "lockin_fast.cli", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {variable: "wrong"})
    errors = [line for line in done.stdout.splitlines() if "error: " in line]
    assert done.returncode == 1 and done.stderr == ""
    assert len(errors) == 1 and message in errors[0]
    assert "\nextras\n" in done.stdout  # the rest of the diagnosis is there all the same


def test_importing_the_command_line_loads_no_heavy_library():
    code = "import sys, lockin_fast.cli; print([m for m in ('transformers', 'peft', 'matplotlib') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_the_doctor_knows_every_extra_that_can_be_installed():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert set(doctor.EXTRAS) == set(project["optional-dependencies"]) - {"test", "all"}


def test_plan_predicts_and_says_what_to_change(command):
    status, out, err = command("plan", "--model", "llama-3.1-8b", "--gpu", "h100", "--set", "train.micro_batch_size=1")
    assert status == 0 and not err and "It fits" in out and "base model" in out and "seconds" in out
    status, out, err = command("plan", "--model", "llama-3.1-8b", "--gpu", "24GB")
    assert status == 1 and not err and "It does not fit" in out and "no rates are known" in out
    assert "train.micro_batch_size=" in out and "train.gradient_checkpointing=true" in out and "fits" in out
    rates = ("--flops", "1e12", "--bandwidth", "1e11")
    status, out, _ = command("plan", "--model", "llama-3.1-8b", "--gpu", "2GB", *rates)
    assert status == 1 and "Nothing here makes it fit" in out and "as given" in out


def test_plan_of_a_configuration_is_of_its_model(command, world):
    status, out, err = command("plan", "--model", world, "--gpu", "1GB", "--reference", "none", "--measure")
    assert status == 0 and not err and "measured here" in out and "reference forward" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "llama-3.1-8b", "--gpu", "big"], "gpu: got 'big', expected a size such as 24GB"),
        (["--model", "llama-3.1-8b", "--gpu", "1GB", "--reference", "disk"], "reference: got 'disk'"),
        (["--model", "llama-3.1-8b", "--gpu", "1GB", "--set", "lora.rank=3"], "lora.rank: unknown key"),
        (["--model", "nowhere.yaml", "--gpu", "1GB"], "nowhere.yaml: no such configuration file"),
    ],
)
def test_plan_names_what_is_wrong(command, words, message):
    status, out, err = command("plan", *words)
    assert status == 1 and not out and err.startswith(f"error: {message}") and err.count("\n") == 1
