"""Two processes under DistributedDataParallel train the adapter that one process trains."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
IN_A_PROCESS = """
import sys, torch, tiny_llama as tiny
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments
from lockin_fast.blocking import BlockTrainer
from lockin_fast.chat import ChatDataset, PaddingCollator
torch.set_num_threads(1)
folder, micro, accumulate = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
penalty = tiny.penalty(500.0)
base = tiny.model()
torch.manual_seed(3)
model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
rows = ChatDataset(tiny.conversations(24), tiny.tokenizer())
arguments = TrainingArguments(
    folder, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, max_steps=3, optim="sgd",
    learning_rate=0.1, logging_steps=1, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulate)
trainer = BlockTrainer(model, arguments, PaddingCollator(0), rows, penalty=penalty)
start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
trainer.train()
keys = ("sft_loss", "block_penalty", "active_fraction")
if trainer.is_world_process_zero():
    torch.save({"start": start, "end": {name: dict(model.named_parameters())[name].detach() for name in start},
                "logs": [row[key] for row in trainer.state.log_history if "loss" in row for key in keys]},
               folder + "/result.pt")
"""


def train(folder, *, processes, micro, accumulate):
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    if processes > 1:
        environment |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", IN_A_PROCESS, str(folder), str(micro), str(accumulate)]
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {} for rank in range(processes)]
    started = [subprocess.Popen(command, env=environment | rank) for rank in ranks]
    assert [process.wait(timeout=300) for process in started] == [0] * processes
    return torch.load(folder / "result.pt", weights_only=True)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    one = train(tmp_path / "one", processes=1, micro=8, accumulate=1)
    two = train(tmp_path / "two", processes=2, micro=2, accumulate=2)
    moved = max((one["end"][name] - one["start"][name]).abs().max() for name in one["end"])
    # Summing a step's tokens in another order moves a sum by at most an ulp a token: 3 steps of 8 rows below 32 tokens.
    rounding = 3 * 8 * 32 * torch.finfo(torch.float32).eps
    for name, tensor in one["end"].items():
        assert torch.equal(one["start"][name], two["start"][name])
        assert (tensor - two["end"][name]).abs().max() <= rounding * moved, name
    assert two["logs"] == pytest.approx(one["logs"], rel=rounding) and max(one["logs"][1::3]) > 0
