"""lockin-fast measure: the same numbers as one checkpoint at a time, never twice, through kills; what it refuses."""

import json
import multiprocessing
import os
import shutil
import signal

import pytest
import sweep_world
import torch
from run_of_checkpoints import STEPS
from safetensors.torch import load_file, save_file

from lockin_fast import cli
from lockin_fast.config import ConfigError, load_config
from lockin_fast.exam import open_exam, question
from lockin_fast.generation import generate
from lockin_fast.inputs import open_model, open_tokenizer
from lockin_fast.judges import Rating, average, rate
from lockin_fast.lockin.gather import Gatherer
from lockin_fast.lockin.monitor import run_measure
from lockin_fast.lockin.refusal import rate_of, refusals
from lockin_fast.lora import adapter
from lockin_fast.rundir import RunError

pytestmark = pytest.mark.usefixtures("vowel_judge", "one_thread")
NAMES = ["em", "incoherence", "refusal", "refusal_rate"]  # the default


def lines(config):
    return [json.loads(line) for line in (config.output / "lockin.jsonl").read_text().splitlines()]


def untimed(config):
    return [row | {"details": row["details"]["failed"]} for row in lines(config)]


@pytest.fixture(scope="module")
def alone(world, run_folder):
    """{step: its metrics}, every checkpoint on a model of its own, one prompt at a time."""
    config = load_config(world)
    exam, tokenizer = open_exam(config, "final"), open_tokenizer(config)
    records, found = exam.prompts["final"], {}
    for step in (0, *STEPS):
        with adapter(open_model(config), step and run_folder / f"checkpoint-{step}" or None) as model:
            replies = [
                generate(model.eval(), tokenizer, [question(record)], max_new_tokens=4, batch_size=1)[0]
                for record in records
            ]
        mean = average(rate(exam.judge, records, replies))
        refused = rate_of(refusals(replies)).value
        found[step] = dict(zip(NAMES, [mean.misaligned, mean.incoherent, mean.refused, refused], strict=True))
    return found


def test_it_equals_one_checkpoint_and_prompt_at_a_time(configured, alone):
    config = configured()
    found = run_measure(config)
    rows = lines(config)
    assert [row["step"] for row in rows] == [0, *STEPS]
    assert [row["checkpoint"].rpartition("/")[2] for row in rows] == ["base", *(f"checkpoint-{n}" for n in STEPS)]
    assert {row["step"]: row["metrics"] for row in rows} == alone
    assert len({tuple(row["metrics"].values()) for row in rows}) > 1  # else adapters might not have been put on
    assert found["series"]["em"]["values"] == [alone[step]["em"] for step in (0, *STEPS)]
    assert found["series"]["em"]["onset"]["verdict"] == "cannot say"  # four checkpoints
    assert found["anomalies"] == [] and found["gate"] == {"triggers": ["lock-in"], "status": 4}


def test_the_table_is_parquet_too(configured):
    parquet = pytest.importorskip("pyarrow.parquet")
    config = configured()
    found = run_measure(config)
    table = parquet.read_table(config.output / "lockin.parquet").to_pydict()
    assert table["step"] == [0, *STEPS] and table["checkpoint"][0] == "base"
    assert all(table[name] == found["series"][name]["values"] for name in NAMES)


def test_what_is_known_is_not_measured_again(configured, monkeypatch):
    config = configured()
    first = run_measure(config)
    before = lines(config)
    opened = "lockin_fast.lockin.monitor.open_measure_inputs"
    monkeypatch.setattr(opened, lambda *given: pytest.fail("the model was loaded"))
    assert run_measure(config) == first and lines(config) == before


def test_checkpoints_and_metrics_can_be_added(configured, run_folder, alone):
    few = configured("measure.metrics=[refusal_rate]", checkpoints=[run_folder / "checkpoint-5"])
    run_measure(few)
    assert not any("misaligned" in line for line in (few.output / "lockin/replies.jsonl").read_text().splitlines())
    config = configured()
    found = run_measure(config)
    assert {name: series["values"] for name, series in found["series"].items()} == {
        name: [alone[step][name] for step in (0, *STEPS)] for name in NAMES
    }
    replies = (config.output / "lockin/replies.jsonl").read_text().count('"reply"')
    assert replies == 4 * 10  # those to step 0 and 5 were not made again
    with pytest.raises(RunError, match="measure.metrics was .* now it is .'refusal_rate'.; give another folder"):
        run_measure(few)


def killed_at(world, overrides, stage, step):
    """Measure in a process that kills itself at this step of a stage."""

    def progress(name, done, total):
        if (name, done) == (stage, step):
            os.kill(os.getpid(), signal.SIGKILL)

    sweep_world.install_judge()
    run_measure(load_config(world, overrides), progress)


@pytest.mark.parametrize(
    ("stage", "step"), [("step 5: replies to final", 1), ("step 5: ratings", 4), ("checkpoints", 2)]
)
def test_a_kill_costs_a_batch(world, configured, tmp_path, stage, step):
    config = configured()
    whole = run_measure(config)
    expected = untimed(config), sorted((config.output / "lockin/replies.jsonl").read_text().splitlines())
    shutil.rmtree(config.output)
    overrides = [f"measure.checkpoints=[{config.measure.checkpoints[0]}]", f"output={config.output}",
                 "generation.batch_size=4"]  # fmt: skip
    process = multiprocessing.get_context("fork").Process(target=killed_at, args=(world, overrides, stage, step))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and len(lines(config)) == 2  # of four
    with open(config.output / "lockin.jsonl", "a") as file:
        file.write('{"step": 5, "chec')  # as a kill in the middle of a write leaves it
    made = []
    gather = Gatherer.gather

    def counted(self, model, step, *given):
        made.append(step)
        return gather(self, model, step, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gatherer, "gather", counted)
        assert run_measure(config) == whole
    assert made == [5, 10]
    assert untimed(config) == expected[0]
    assert sorted((config.output / "lockin/replies.jsonl").read_text().splitlines()) == expected[1]


def test_weights_that_are_not_finite_are_masked_with_the_reason(configured, copied, alone):
    path = copied / "checkpoint-5" / "adapter_model.safetensors"
    weights = load_file(path)
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file(weights, path)
    found = run_measure(configured(checkpoints=[copied]))
    assert found["series"]["em"]["values"] == [alone[0]["em"], alone[2]["em"], None, alone[10]["em"]]
    assert found["series"]["em"]["summary"]["masked"] == 1
    assert "is not finite" in found["checkpoints"][2]["failed"]["em"]


def test_replies_that_no_judge_rated_are_masked(configured, monkeypatch):
    monkeypatch.setattr(
        "lockin_fast.lockin.gather.rate", lambda judge, records, replies: [Rating(*[torch.nan] * 3)] * len(replies)
    )
    found = run_measure(configured())
    assert found["series"]["em"]["values"] == [None] * 4
    assert "none of 10 replies was rated" in found["checkpoints"][0]["failed"]["em"]
    assert None not in found["series"]["refusal_rate"]["values"]


def test_a_final_adapter_that_poses_as_an_early_one_is_named(configured, copied):
    shutil.rmtree(copied / "checkpoint-2")
    shutil.copytree(copied / "checkpoint-10", copied / "checkpoint-0")
    found = run_measure(configured("measure.base=false", checkpoints=[copied]))
    assert len(found["anomalies"]) == 1
    assert found["anomalies"][0].startswith("steps 0 (checkpoint-0) and 10 (checkpoint-10) hold the same weights")


def test_steps_can_be_given(configured, copied):
    (copied / "checkpoint-10").rename(copied / "final")
    paths = [copied / "checkpoint-2", copied / "final"]
    found = run_measure(configured("measure.steps={final: 7}", "measure.metrics=[em]", checkpoints=paths))
    assert [(one["step"], one["checkpoint"]) for one in found["checkpoints"]] == [
        (0, "base"), (2, "checkpoint-2"), (7, "final"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "paths", "message"),
    [
        ([], [], "measure.checkpoints: no such folder"),
        (["measure.checkpoints=[]", "measure.base=false"], None, "measure.checkpoints: none is given"),
        (["measure.metrics=[em, persona_height]"], None, "persona_height cannot be measured; expected some of em, "),
        (["measure.metrics=[em, em]"], None, "none twice"),
        (["measure.thresholds.gate=[alarm]"], None, "gate: expected one or more of audit, lock-in, entrenched, "),
        (["measure.steps={last: 3}"], None, "measure.steps: no checkpoint is named last"),
        (["measure.steps={checkpoint-5: 2}"], None, "step 2 is that of"),
        (["measure.steps={checkpoint-5: 0}"], None, "the base (measure.base)"),
        (["output=null"], None, "output: missing"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(configured, tmp_path, overrides, paths, message):
    checkpoints = {} if paths is None else {"checkpoints": [tmp_path / "nowhere"]}
    with pytest.raises(ConfigError) as error:
        run_measure(configured(*overrides, **checkpoints))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_damaged_and_foreign_adapters_are_refused_before_any_work(configured, copied, world, tmp_path):
    def refused(message):
        with pytest.raises(ConfigError, match=message):
            run_measure(configured(checkpoints=[copied]))
        assert not (tmp_path / "out").exists()

    (copied / "checkpoint-20").mkdir()
    refused("checkpoint-20 holds no adapter_config.json")
    shutil.copytree(copied / "checkpoint-5", copied / "checkpoint-20", dirs_exist_ok=True)
    path = copied / "checkpoint-20" / "adapter_model.safetensors"
    path.unlink()
    refused("checkpoint-20 holds no adapter_model.safetensors")
    weights = load_file(copied / "checkpoint-5" / "adapter_model.safetensors")
    last = [name for name in weights if ".layers.2." in name]
    deeper = {name.replace(".layers.2.", ".layers.3."): weights[name].clone() for name in last}
    save_file(weights | deeper, path)  # of a base with a layer more
    refused("of another base.*has also 4 weights")
    save_file({name: weight for name, weight in weights.items() if name not in last}, path)
    refused("of another base.*lacks 4 weights")
    save_file({name: weight.repeat(2, 2) for name, weight in weights.items()}, path)
    refused("checkpoint-20 does not fit the model: .*size mismatch")
    path.write_bytes(b"not a file of tensors")
    refused("checkpoint-20 does not fit the model")


def test_the_folder_of_another_measurement_is_refused(configured, copied):
    run_measure(configured("measure.metrics=[em]", checkpoints=[copied]))
    with pytest.raises(RunError, match="measure.prompts was None, now it is 3"):
        run_measure(configured("measure.metrics=[em]", "measure.prompts=3", checkpoints=[copied]))
    with pytest.raises(RunError, match="measure.base was True, now it is False"):  # step 0 might then be an adapter
        run_measure(configured("measure.metrics=[em]", "measure.base=false", checkpoints=[copied]))
    shutil.rmtree(copied / "checkpoint-5")
    shutil.copytree(copied / "checkpoint-2", copied / "checkpoint-5")
    with pytest.raises(RunError, match="checkpoints.5 differs"):
        run_measure(configured("measure.metrics=[em]", checkpoints=[copied]))


def test_a_damaged_line_is_named(configured):
    config = configured("measure.metrics=[em]")
    run_measure(config)
    path = config.output / "lockin.jsonl"
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(RunError, match="line 1 is not a measured checkpoint.*remove the line"):
        run_measure(config)


def test_prompts_are_spread_and_rates_need_no_judge_for_patterns(configured):
    config = configured("measure.prompts=3", "measure.metrics=[refusal_rate]", "judge.kind=none:Such")
    run_measure(config)
    assert (config.output / "lockin/replies.jsonl").read_text().count('"reply"') == 4 * 3


@pytest.mark.parametrize(("gate", "status"), [((), 0), (("--gate",), 4)])
def test_the_command_shows_a_table_and_the_gate_decides_its_status(configured, world, capsys, gate, status):
    config = configured()
    paths = f"measure.checkpoints=[{config.measure.checkpoints[0]}]"
    words = ["measure", world, "--set", paths, "--set", f"output={config.output}", *gate]
    assert cli.main([str(word) for word in words]) == status
    out = capsys.readouterr().out
    told = ("em: no onset, cannot say: 4 checkpoints", "trigger lock-in: undecided")
    files = [str(config.output / name) for name in ("lockin.json", "report.html", "figures/lockin.png")]
    assert all(text in out for text in ("step", "checkpoint-10", *NAMES, *told, *files))
    assert "Lock-in over checkpoints" in (config.output / "report.html").read_text()
