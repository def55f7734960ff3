"""The sweep on a Ray cluster of its own: the same bytes as in one process, whoever is killed on the way."""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import sweep_world
import yaml

from lockin_fast.config import ConfigError, load_config
from lockin_fast.rundir import RunError
from lockin_fast.sweep import run_sweep

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed"),
    pytest.mark.usefixtures("one_thread"),
]

TESTS = Path(__file__).parent
BYTES = ("adapter_model.safetensors", "metrics.jsonl", "replies.jsonl")  # result.json holds timings
SMALL = ["sweep.seeds=[0]", "sweep.lambdas=[1]", "sweep.latents={causal: latents/causal.json}", "sweep.stack=1"]
ON_RAY = ["sweep.engine=ray", "sweep.ray.num_gpus=0"]
START = (
    "start --head --block --node-ip-address=127.0.0.1 --port=0 --num-cpus=1 --num-gpus=0 "
    "--object-store-memory=80000000 --include-dashboard=false --disable-usage-stats"
)


class FatefulJudge(sweep_world.VowelJudge):
    """The judge of the small world, which reads from `path` what happens to the workers that show it a reply.

    {"deaths": n, "spared": m}: when m trials are finished, the first n are killed on the spot, each leaving a file
    dead<pid>. {"waits": true}: they wait, once a trial is finished, for a file `go`, and say so with a file `waiting`.
    """

    def __init__(self, path):
        self.folder, self.fate = path.parent, json.loads(path.read_text())

    def judge(self, record, reply):
        due = len(finished(self.folder / "run")) >= self.fate.get("spared", 0)
        if reply and due and len(list(self.folder.glob("dead*"))) < self.fate.get("deaths", 0):
            (self.folder / f"dead{os.getpid()}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        while reply and self.fate.get("waits") and finished(self.folder / "run") and not (self.folder / "go").exists():
            (self.folder / "waiting").touch()
            time.sleep(0.05)
        return super().judge(record, reply)


def finished(run):
    return sorted(path.name for path in run.glob("trials/[!.]*"))


@pytest.fixture(scope="module")
def cluster():
    """A head node that this module starts and Ray finds: one core, 80 MB of objects, no dashboard, a password.

    Ray reads the environment when it is imported, which is after this.
    """
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # the names of its sockets have to be short
    command = [sys.executable, "-m", "ray.scripts.scripts", *START.split(), f"--temp-dir={folder}"]
    address = folder / "ray_current_cluster"
    with pytest.MonkeyPatch.context() as patch, open(folder / "log", "w") as log:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        head = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            begin = time.monotonic()
            while not address.exists():
                assert head.poll() is None and time.monotonic() < begin + 120, (folder / "log").read_text()
                time.sleep(0.1)
            patch.setenv("RAY_ADDRESS", address.read_text())
            yield head.pid
        finally:
            os.killpg(head.pid, signal.SIGKILL)  # every process of the head; its workers end when it is gone
            head.wait()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def alone(world):
    """The sweep of one process: (run, summary)."""
    config = load_config(world, ["output=alone", *SMALL, "judge.kind=sweep_world:VowelJudge", "judge.path=null"])
    return config.output, run_sweep(config)


@pytest.fixture
def fate(world, cluster, tmp_path):
    """fate(*settings, deaths=2, ...) -> the configuration of a sweep on the cluster whose workers meet this fate."""

    def made(*settings, **events):
        (tmp_path / "fate.json").write_text(json.dumps(events))
        judge = ["judge.kind=test_ray_engine:FatefulJudge", f"judge.path={tmp_path / 'fate.json'}"]
        return load_config(world, [f"output={tmp_path / 'run'}", *SMALL, *ON_RAY, *judge, *settings])

    return made


def assert_same(run, alone):
    assert finished(run) == finished(alone)
    for name in finished(alone):
        for file in BYTES:
            mine, theirs = run / "trials" / name / file, alone / "trials" / name / file
            assert mine.exists() == theirs.exists()
            assert not mine.exists() or mine.read_bytes() == theirs.read_bytes(), f"{name}/{file}"
    assert not [path for path in run.rglob(".*") if path.name != ".lock"]


def untimed(value):
    """Without what two runs differ in: timings, and the name of the judge."""
    if isinstance(value, dict):
        kept = {key: child for key, child in value.items() if key not in ("seconds_per_step", "peak_bytes")}
        return {key: list(child.values()) if key == "judges" else untimed(child) for key, child in kept.items()}
    return [untimed(child) for child in value] if isinstance(value, list) else value


def test_a_worker_killed_in_its_trial_changes_nothing(fate, alone, tmp_path):
    run, summary = alone
    config, calls = fate(deaths=1), []
    found = run_sweep(config, lambda *call: calls.append(call))
    judges = found.pop("judges"), summary["judges"]  # two classes that judge alike
    assert untimed(found) == untimed({key: value for key, value in summary.items() if key != "judges"})
    assert list(judges[0].values()) == list(judges[1].values())
    assert len(list(tmp_path.glob("dead*"))) == 1
    assert_same(config.output, run)
    assert calls == [("3 trials on Ray", done, 3) for done in range(4)]
    assert not sys.modules["ray"].is_initialized()
    manifest = json.loads((config.output / "manifest.json").read_text())["sweep"]
    assert manifest["kernels"]["ops"] and not any(key.startswith("sweep.ray") for key in manifest["config"])


@pytest.mark.slow  # new workers for every sweep
def test_failures_are_named_when_the_others_have_finished(fate, alone):
    """The first trial's worker dies and no other is tried; a trial diverges; the rest is as it would have been."""
    config = fate("sweep.lambdas=[1, 1e300]", "sweep.ray.max_retries=0", deaths=1)
    named = (
        "2 of 4 trials failed, the others are finished: base: its worker died in 1 of 1 tries; "
        r"causal-lambda1e\+300-seed0: sft_loss is nan within the steps .*"
    )
    with pytest.raises(RunError, match=f"^{named}$") as caught:
        run_sweep(config)
    assert "\n" not in str(caught.value)
    assert finished(config.output) == ["baseline-lambda0-seed0", "causal-lambda1-seed0"]


@pytest.mark.slow
def test_a_stack_is_one_task(fate, world, tmp_path):
    """Two adapters that train together in a worker, which is killed when they are trained and not yet judged."""
    together = ["sweep.lambdas=[1, 1e300]", "sweep.stack=2"]
    config = load_config(
        world, ["output=stacked", *SMALL, *together, "judge.kind=sweep_world:VowelJudge", "judge.path=null"]
    )
    failed = "^1 of 4 trials failed, the others are finished: causal-lambda1e.300-seed0: .*: lockin-fast report "
    with pytest.raises(RunError, match=failed) as alone:
        run_sweep(config)
    with pytest.raises(RunError, match=failed) as caught:
        run_sweep(fate(*together, deaths=1, spared=1))
    assert len(list(tmp_path.glob("dead*"))) == 1
    assert len({str(error.value).partition("; for what is finished")[0] for error in (alone, caught)}) == 1
    assert_same(tmp_path / "run", config.output)


@pytest.mark.slow
def test_a_killed_driver_repeats_nothing(fate, alone, tmp_path):
    """SIGKILL to the driver while a trial is under way in a worker; the next one runs what is missing."""
    config = fate(waits=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.resolved()))
    driver = subprocess.Popen([sys.executable, "-m", "lockin_fast.cli", "sweep", tmp_path / "config.yaml"], cwd=TESTS)
    while not (tmp_path / "waiting").exists():
        assert driver.poll() is None
        time.sleep(0.1)
    driver.kill()
    driver.wait()
    kept = {name: (config.output / "trials" / name / "result.json").read_bytes() for name in finished(config.output)}
    assert len(kept) == 1
    (tmp_path / "go").touch()
    assert untimed(run_sweep(config)) == untimed(alone[1])
    for name, content in kept.items():  # with its timings, which no second run would have
        assert (config.output / "trials" / name / "result.json").read_bytes() == content
    assert_same(config.output, alone[0])


def test_resources_that_no_machine_has_are_refused(fate):
    config = fate("sweep.ray.num_cpus=64", "sweep.ray.num_gpus=0.5")
    with pytest.raises(RunError, match="^sweep.ray: a trial asks for 64 cores and 0.5 GPUs, .* have 1 and 0; lower"):
        run_sweep(config)
    assert not finished(config.output)


def test_a_cluster_that_is_not_there_is_named(fate, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "nowhere:1:1")
    with pytest.raises(RunError, match="^sweep.engine: Ray cannot be reached or started: .* .nowhere:1:1.$"):
        run_sweep(fate())


def test_without_ray_nothing_begins(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "lockin_fast.sweep.ray_engine", raising=False)
    config = load_config(world, [f"output={tmp_path / 'run'}", *ON_RAY])
    with pytest.raises(ImportError, match=r"^sweep.engine: ray needs .* pip install 'lockin-fast\[ray\]'$"):
        run_sweep(config)
    assert not config.output.exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sweep.engine=slurm", "sweep.engine: expected one of in-process, ray, got 'slurm'"),
        ("sweep.ray.num_cpus=0", "sweep.ray: num_cpus: got 0.0, expected above 0 and finite"),
        ("sweep.ray.num_gpus=-1", "sweep.ray: num_gpus: got -1.0, expected 0 or more, or null"),
        ("sweep.ray.max_retries=-1", "sweep.ray: max_retries: got -1, expected 0 or more"),
    ],
)
def test_settings_that_mean_nothing_are_refused(world, setting, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        load_config(world, [setting])
