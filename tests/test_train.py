"""fine_tune: an ordinary adapter, the same for the same seed, and a base model that never notices."""

import dataclasses
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_llama as tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file

from lockin_fast import watching
from lockin_fast.chat import ChatDataset
from lockin_fast.lora import adapter
from lockin_fast.train import LoraSettings, TrainSettings, fine_tune
from lockin_fast.watching import Watch

LORA = LoraSettings(r=4, alpha=8)
SETTINGS = TrainSettings(steps=3, batch_size=8, learning_rate=1e-2, logging_steps=2)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def rows(tokenizer):
    return ChatDataset(tiny.conversations(24), tokenizer)


def train(model, tokenizer, rows, output, **options):
    return fine_tune(model, tokenizer, rows, output, **{"lora": LORA, "settings": SETTINGS, **options})


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def test_it_writes_an_ordinary_adapter_and_says_how_it_went(tmp_path, tokenizer, rows):
    steps, model = [], tiny.model()
    result = train(
        model, tokenizer, rows, tmp_path / "runs" / "a",
        penalty=tiny.penalty(5.0), progress=lambda *at: steps.append(at),
    )  # fmt: skip
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert [row["step"] for row in result.history] == [2, 3]
    last = result.history[-1]
    assert result.sft_loss == last["sft_loss"] and result.penalty == last["block_penalty"] > 0
    assert 0 < result.active_fraction < 1 and result.seconds_per_step > 0 and result.peak_bytes > 2**20
    assert os.listdir(tmp_path / "runs") == ["a"]
    lines = (result.adapter_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history

    ids = rows[0]["input_ids"][None]
    with torch.no_grad():
        base = model(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(model, result.adapter_path)
        assert not torch.equal(loaded(input_ids=ids).logits, base)
    saved = load_file(result.adapter_path / "adapter_model.safetensors")
    assert len(saved) == 2 * 4 * tiny.LAYERS and all(tensor.isfinite().all() for tensor in saved.values())


def snapshot(model):
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [(name, type(module), module.training) for name, module in model.named_modules()],
        [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
        model.config.to_dict(),
        sorted(vars(model)),
    )


def assert_unchanged(model, before):
    weights, *rest = snapshot(model)
    assert rest == list(before[1:])
    assert all(torch.equal(weights[name], tensor) for name, tensor in before[0].items())


def test_the_base_model_comes_back_bit_for_bit_also_after_a_failure(tmp_path, tokenizer, rows):
    model = tiny.model()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    before = snapshot(model)
    train(model, tokenizer, rows, tmp_path / "a", penalty=tiny.penalty())
    assert_unchanged(model, before)

    def interrupt(step, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, tokenizer, rows, tmp_path / "b", penalty=tiny.penalty(), progress=interrupt)
    assert_unchanged(model, before)
    assert os.listdir(tmp_path) == ["a"]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path, tokenizer, rows):
    model = tiny.model()
    penalty = tiny.penalty()
    first = train(model, tokenizer, rows, tmp_path / "first", penalty=penalty)
    torch.rand(5)
    second = train(model, tokenizer, rows, tmp_path / "second", penalty=penalty)
    assert files(first.adapter_path) == files(second.adapter_path)
    other = train(model, tokenizer, rows, tmp_path / "other", settings=TrainSettings(
        steps=3, batch_size=8, learning_rate=1e-2, logging_steps=2, seed=1
    ))  # fmt: skip
    name = "adapter_model.safetensors"
    assert files(first.adapter_path)[name] != files(other.adapter_path)[name]
    assert other.penalty is None and other.active_fraction is None


IN_A_PROCESS = """
import logging
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # what it says when PEFT imports it is not ours
import sys, torch, tiny_llama as tiny
from lockin_fast.train import LoraSettings, TrainSettings, fine_tune
torch.set_num_threads(1)
fine_tune(tiny.model(), tiny.tokenizer(), tiny.conversations(24), sys.argv[1], lora=LoraSettings(r=4, alpha=8),
          settings=TrainSettings(steps=2, batch_size=8), penalty=tiny.penalty())
"""


@pytest.mark.slow  # three new processes; everyday the build of the organism is compared across processes
def test_processes_with_other_hash_seeds_write_the_same_bytes_and_print_nothing(tmp_path):
    # PEFT keeps module names in a set, whose order follows the hash seed.
    root = Path(__file__).parents[1]
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
        command = [sys.executable, "-c", IN_A_PROCESS, str(tmp_path / seed)]
        done = subprocess.run(command, check=True, env=environment, capture_output=True)
        assert done.stdout == b"" and done.stderr == b""
    assert files(tmp_path / "1") == files(tmp_path / "2")


def test_the_callers_random_state_stays_and_decides_nothing(tmp_path, tokenizer, rows):
    lora = LoraSettings(r=4, alpha=8, dropout=0.1)
    torch.manual_seed(5)
    first = train(tiny.model(), tokenizer, rows, tmp_path / "first", lora=lora)
    model = tiny.model()
    torch.manual_seed(6)
    state = torch.get_rng_state()
    second = train(model, tokenizer, rows, tmp_path / "second", lora=lora)
    assert torch.equal(torch.get_rng_state(), state)
    assert files(first.adapter_path) == files(second.adapter_path)


def test_an_adapter_is_put_on_and_taken_off_without_a_change_of_modes(tmp_path, tokenizer, rows):
    model = tiny.model()
    folder = train(model, tokenizer, rows, tmp_path / "a").adapter_path
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    with adapter(model, folder) as adapted:
        adapted.eval()
    assert [module.training for module in model.modules()] == modes


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be reset here")
def test_the_peak_is_of_this_run(tmp_path, tokenizer, rows, monkeypatch):
    ballast = torch.ones(2**28, dtype=torch.uint8)  # 256 MB that are gone again before the training
    del ballast
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = train(tiny.model(), tokenizer, rows, tmp_path / "a")
    assert 2**24 < result.peak_bytes < before - 2**27
    monkeypatch.setattr(watching, "CLEAR_REFS", tmp_path / "no folder" / "absent")
    assert train(tiny.model(), tokenizer, rows, tmp_path / "b").peak_bytes is None


def test_micro_batches_and_bf16_run(tmp_path, tokenizer, rows):
    settings = TrainSettings(steps=2, batch_size=8, micro_batch_size=2, learning_rate=1e-2, bf16=True, logging_steps=1)
    result = train(tiny.model(), tokenizer, rows, tmp_path / "a", settings=settings, penalty=tiny.penalty())
    assert result.history[0]["block_penalty"] == 0.0 and result.penalty > 0.0
    plain = train(tiny.model(), tokenizer, rows, tmp_path / "b")  # bf16 does not stick to the process
    assert plain.sft_loss > 0


def test_epochs_count_rows(tmp_path, tokenizer, rows):
    settings = TrainSettings(epochs=2, batch_size=8, logging_steps=100, schedule="constant", warmup_steps=1)
    assert train(tiny.model(), tokenizer, rows, tmp_path / "a", settings=settings).history[-1]["step"] == 6


def test_checkpointing_changes_nothing_but_memory_and_is_off_afterwards(tmp_path, tokenizer, rows):
    weights, model = [], tiny.model()
    before = snapshot(model)
    for checkpointing in (False, True):
        settings = dataclasses.replace(SETTINGS, gradient_checkpointing=checkpointing)
        folder = tmp_path / str(checkpointing)
        runs = []
        count = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        train(model, tokenizer, rows, folder, settings=settings, penalty=tiny.penalty())
        count.remove()
        assert len(runs) == 3 * (3 if checkpointing else 2)  # forward, reference, and once more in the backward
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        assert not model.model.embed_tokens._forward_hooks
        weights.append(files(folder)["adapter_model.safetensors"])
    assert weights[0] == weights[1]
    assert_unchanged(model, before)


@pytest.mark.parametrize("option", ["use_rslora", "use_dora"])
def test_variants_of_lora_are_what_peft_calls_them(tmp_path, tokenizer, rows, option):
    lora = dataclasses.replace(LORA, **{option: True})
    result = train(tiny.model(), tokenizer, rows, tmp_path / "a", lora=lora, penalty=tiny.penalty())
    assert json.loads((result.adapter_path / "adapter_config.json").read_text())[option] is True
    assert result.history[0]["step"] == 2 and result.penalty > 0
    plain = train(tiny.model(), tokenizer, rows, tmp_path / "b", penalty=tiny.penalty())
    assert plain.sft_loss != result.sft_loss


def test_lora_layers_say_where_it_writes(tmp_path, tokenizer, rows):
    lora = LoraSettings(r=2, target_modules=("q_proj", "down_proj"), layers=(0, 1))
    result = train(tiny.model(), tokenizer, rows, tmp_path / "a", lora=lora, penalty=tiny.penalty())
    saved = load_file(result.adapter_path / "adapter_model.safetensors")
    assert {name.split(".layers.")[1].split(".")[0] for name in saved} == {"0", "1"} and len(saved) == 8


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lora": LoraSettings(target_modules=("q_proj", "c_attn"))}, ValueError, r"layers have no \['c_attn'\]"),
        ({"lora": LoraSettings(target_modules=("input_layernorm",))}, ValueError, "have no .*layernorm"),
        ({"lora": LoraSettings(layers=(0, 7))}, ValueError, r"lora.layers: got \[7\], expected 0 to 2"),
        ({"lora": LoraSettings(layers=(2,))}, ValueError, "the lowest is 2, above the penalised layer 1"),
        ({"penalty": tiny.penalty(layer=5)}, ValueError, "layer: got 5, expected 0 to 2"),
        ({"dataset": "/nowhere.jsonl"}, FileNotFoundError, "no file /nowhere.jsonl"),
        ({"dataset": []}, ValueError, "got no conversations"),
    ],
)
def test_mistakes_are_told_before_training_and_leave_nothing(tmp_path, tokenizer, rows, options, error, message):
    model, started = tiny.model(), []
    before = snapshot(model)
    options = {"penalty": tiny.penalty(), **options}
    dataset = options.pop("dataset", rows)
    with pytest.raises(error, match=message):
        train(model, tokenizer, dataset, tmp_path / "a", progress=lambda *at: started.append(at), **options)
    assert not started and os.listdir(tmp_path) == []
    assert_unchanged(model, before)


def test_nothing_is_overwritten(tmp_path, tokenizer, rows):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "precious").write_text("x")
    with pytest.raises(FileExistsError, match="output: .*a exists"):
        train(tiny.model(), tokenizer, rows, tmp_path / "a")
    assert os.listdir(tmp_path / "a") == ["precious"]


def test_a_full_disk_is_told_before_training(tmp_path, tokenizer, rows, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    started = []
    with pytest.raises(OSError, match="0.0 MB free, the adapter needs") as caught:
        train(tiny.model(), tokenizer, rows, tmp_path / "a", progress=lambda *at: started.append(at))
    assert caught.value.errno == errno.ENOSPC and not started and os.listdir(tmp_path) == []


def test_a_write_that_fails_leaves_nothing(tmp_path, tokenizer, rows):
    model = tiny.model()
    before, limit = snapshot(model), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, limit[1]))
    try:
        with pytest.raises(OSError, match="output: the adapter could not be written to .*File too large"):
            train(model, tokenizer, rows, tmp_path / "a", lora=LoraSettings(r=32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert os.listdir(tmp_path) == []
    assert_unchanged(model, before)


def test_a_model_with_adapters_is_refused(tmp_path, tokenizer, rows):
    train(tiny.model(), tokenizer, rows, tmp_path / "a")
    with pytest.raises(ValueError, match="model: it has PEFT adapters already"):
        train(PeftModel.from_pretrained(tiny.model(), tmp_path / "a"), tokenizer, rows, tmp_path / "b")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 8, "micro_batch_size": 3}, "train.micro_batch_size: got 3, expected a divisor of batch_size=8"),
        ({"steps": 0}, "train.steps: got 0"),
        ({"learning_rate": 0.0}, "train.learning_rate: got 0.0, expected more than 0"),
        ({"schedule": "step"}, "train.schedule: got 'step', expected one of linear, cosine"),
        ({"seed": -1}, "train.seed: got -1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**settings)
    with pytest.raises(ValueError, match="lora.r: got 0, expected 1 or more"):
        LoraSettings(r=0)


def test_a_loss_that_is_not_finite_writes_no_adapter(tmp_path, tokenizer, rows):
    model = tiny.model()
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="sft_loss is nan"):
        train(model, tokenizer, rows, tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_epochs_are_told_and_their_time_is_not_training(tmp_path, tokenizer, rows, monkeypatch):
    told, away, clock = [], [0.0], time.perf_counter
    monkeypatch.setattr("lockin_fast.watching.time.perf_counter", lambda: clock() + away[0])

    def epoch_done(epoch, model):
        told.append((epoch, model.training, type(model).__name__))
        away[0] += 1e6
        return {"epoch": epoch}

    watch = Watch(lambda step, total: told.append((step, total)), epoch_done)
    settings = dataclasses.replace(SETTINGS, steps=4, batch_size=8)
    result = train(tiny.model(), tokenizer, rows, tmp_path / "out", settings=settings, progress=watch)
    assert [entry for entry in told if len(entry) == 2] == [(step, 4) for step in range(1, 5)]
    epochs = [entry for entry in told if len(entry) == 3]
    assert epochs == [(1.0, True, "PeftModelForCausalLM"), (1.333333, True, "PeftModelForCausalLM")]
    assert watch.epochs == [{"epoch": 1.0}, {"epoch": 1.333333}]
    assert 0 < result.seconds_per_step < 1e5
