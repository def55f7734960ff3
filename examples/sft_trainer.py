"""TRL's SFTTrainer with latent blocking: the script that people have, and three lines more.

    python examples/sft_trainer.py
"""

import sys
import tempfile
from pathlib import Path

import tiny_world
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from lockin_fast import BlockPenalty, LatentSet, attach, load_sae


def train(world: Path, weight: float) -> list[dict]:
    """Fine-tune with lambda = weight; return the trainer's log."""
    rows = load_dataset("json", data_files=str(world / "train.jsonl"), split="train")
    rows = rows.map(lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]})
    torch.manual_seed(0)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(world / "model"),
        processing_class=AutoTokenizer.from_pretrained(world / "model"),
        train_dataset=rows.remove_columns("messages"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(), learning_rate=1e-2, num_train_epochs=5, per_device_train_batch_size=16,
            logging_steps=2, save_strategy="no", report_to="none", bf16=False, gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
        ),
    )  # fmt: skip

    # What is new: the latents, their rows of the SAE, and the penalty. Packing and padding_free=True work as well.
    latents = LatentSet.load(world / "latents.json")
    sae = load_sae(world / "sae", latents=latents.indices)
    attach(trainer, BlockPenalty(sae, latents, layer=1, weight=weight))

    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    for row in train(tiny_world.write(), float(sys.argv[1]) if len(sys.argv) > 1 else 13e3):
        print({key: row[key] for key in ("sft_loss", "block_penalty", "active_fraction", "lambda")})
