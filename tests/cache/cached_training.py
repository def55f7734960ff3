"""What the tests of this folder share: how caches are written, and trainers on the tiny Llama."""

import tiny_llama as tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from lockin_fast.blocking import BlockTrainer
from lockin_fast.blocking.write_cache import WriteSettings
from lockin_fast.chat import PaddingCollator

LAYER = 1
SETTINGS = WriteSettings(batch_size=4, shard_tokens=60)


def adapted(*, dtype=torch.float32, random_b=True, **options):
    """A tiny Llama with LoRA; with a random B the penalty is active from the first step on."""
    base = tiny.model(dtype=dtype, **options)
    torch.manual_seed(3)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if random_b and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def trainer(folder, model, rows, penalty, *, cls=BlockTrainer, collator=None, **options):
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, optim="sgd",
        **{"learning_rate": 0.1, "max_steps": 3, "per_device_train_batch_size": 8, "logging_steps": 1, **options},
    )  # fmt: skip
    options = {"penalty": penalty} if cls is BlockTrainer else {}
    return cls(
        model=model, args=arguments, train_dataset=rows, data_collator=collator or PaddingCollator(0), **options
    )  # fmt: skip


def adapter(trained):
    return {name: p.detach().clone() for name, p in trained.model.named_parameters() if p.requires_grad}


def history(trained, key="block_penalty"):
    return [row[key] for row in trained.state.log_history if "loss" in row]
