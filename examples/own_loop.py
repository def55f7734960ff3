"""A training loop of one's own with latent blocking: the loss stays as it is, the gradient of the penalty is injected.

    python examples/own_loop.py
"""

import sys
from pathlib import Path

import tiny_world
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lockin_fast import BlockPenalty, GradientInjection, LatentSet, load_sae
from lockin_fast.chat import ChatDataset, PaddingCollator

BATCH, MICRO, EPOCHS = 16, 4, 5


def train(world: Path, weight: float) -> list[dict]:
    """Fine-tune with lambda = weight, in micro-batches; return loss and penalty of every optimiser step."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(world / "model"),
        LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    ).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    rows, collate = ChatDataset(world / "train.jsonl", tokenizer), PaddingCollator(tokenizer.pad_token_id)

    # What is new, once: the latents, their rows of the SAE, the penalty, and the model that it goes into.
    latents = LatentSet.load(world / "latents.json")
    sae = load_sae(world / "sae", latents=latents.indices)
    blocking = GradientInjection(model, BlockPenalty(sae, latents, layer=1, weight=weight))

    log = []
    for step in range(EPOCHS * len(rows) // BATCH):
        start = step * BATCH % len(rows)
        batches = [
            collate([rows[i] for i in range(first, first + MICRO)]) for first in range(start, start + BATCH, MICRO)
        ]
        # The supervised targets of the whole step: what the loss is divided by, and the penalty with it.
        targets = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        losses, penalties = [], []
        for batch in batches:
            labels = batch.pop("labels")
            with blocking(labels, normalizer=targets):  # new: around the forward
                logits = model(**batch).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
            (loss / targets).backward()  # the gradient of lambda * L_block comes with it
            losses.append(loss.detach() / targets)
            penalties.append(blocking.last["block_penalty"])
        optimizer.step()
        optimizer.zero_grad()
        log.append({"sft_loss": sum(losses).item(), "block_penalty": sum(penalties).item()})
    return log


if __name__ == "__main__":
    for row in train(tiny_world.write(), float(sys.argv[1]) if len(sys.argv) > 1 else 13e3):
        print(row)
