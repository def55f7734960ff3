"""The examples run as they stand, do what they say, and are what the page quotes."""

import re
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from lockin_fast import cli

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "from-your-script.md"


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """A copy of examples/ with its stand-ins written, on the path."""
    folder = tmp_path_factory.mktemp("examples") / "examples"
    shutil.copytree(ROOT / "examples", folder, ignore=shutil.ignore_patterns("tiny", "__pycache__"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        import_module("tiny_world").write()
        yield folder
    torch.set_num_threads(threads)
    for name in ("tiny_world", "sft_trainer", "own_loop"):
        sys.modules.pop(name, None)


def assert_blocked(free, blocked):
    """Without blocking the latents move; with it they hardly do, and the task is learned all the same."""
    assert len(free) == len(blocked) > 5
    assert blocked[-1]["block_penalty"] < 0.01 * free[-1]["block_penalty"]
    assert blocked[-1]["sft_loss"] < 0.8 * blocked[0]["sft_loss"]


def test_own_loop(examples):
    module = import_module("own_loop")
    free, blocked = (module.train(examples / "tiny", weight) for weight in (0.0, 100.0))
    assert free[0]["block_penalty"] == blocked[0]["block_penalty"] == 0.0
    assert_blocked(free, blocked)


def test_sft_trainer(examples):
    pytest.importorskip("trl", reason="trl is not installed")
    module = import_module("sft_trainer")
    free, blocked = (module.train(examples / "tiny", weight) for weight in (0.0, 100.0))
    assert {row["lambda"] for row in blocked} == {100.0}
    assert_blocked(free, blocked)


def test_the_papers_settings_and_latents_run_unchanged(examples, capsys):
    config = examples / "paper_script.yaml"
    results = {}
    for weight in ("1e-9", "100"):
        output = examples / f"run-{weight}"
        assert cli.main(["train", str(config), "--set", f"block_lambda={weight}", "--set", f"output={output}"]) == 0
        printed = capsys.readouterr().out
        assert "block_layer 2 is hidden_states[2], the output of model.layers[1]" in printed
        results[weight] = float(re.search(r"penalty +(\S+)", printed)[1])
        assert (output / "adapter" / "adapter_model.safetensors").is_file()
    assert results["100"] < 0.01 * results["1e-9"]


def test_the_page_quotes_the_examples():
    blocks = re.findall(r"<!-- (examples/\S+) -->\n```\w+\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert {name for name, _ in blocks} == {
        "examples/paper_script.yaml", "examples/sft_trainer.py", "examples/own_loop.py"
    }  # fmt: skip
    for name, block in blocks:
        lines = {line.strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()}
        missing = [line for line in block.splitlines() if line.strip() and line.strip() not in lines]
        assert not missing, f"{name} does not have {missing}"
