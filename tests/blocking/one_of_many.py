"""One process of a training run that torchrun starts: FOLDER, mode, rows of a forward, forwards of a step.

Trains the same adapter with and without the penalty; leaves in FOLDER/result.pt, for each, the gradients of the
first step, the adapter after the last one, and the log. A fifth argument is the cache to take the reference from, or
"kl" for a KL penalty.
"""

import sys

import tiny_llama as tiny
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback, TrainingArguments

from lockin_fast.blocking import BlockTrainer, KLPenalty
from lockin_fast.blocking.layers import is_sharded
from lockin_fast.cache import open_cache
from lockin_fast.chat import ChatDataset, PaddingCollator

LOGGED = ("sft_loss", "block_penalty", "kl", "active_fraction")
STEPS = 3


class FirstGradients(TrainerCallback):
    def __init__(self):
        self.found = {}

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if not self.found:
            self.found = whole({name: p.grad for name, p in model.named_parameters() if p.requires_grad})


def whole(tensors):
    """Copies of tensors, put together from their shards, under the names they had; every process has to ask."""
    parts = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}
    return {
        name.removeprefix("module.").replace("_checkpoint_wrapped_module.", ""): t.detach().clone()
        for name, t in parts.items()
    }


def train(folder, mode, micro, accumulate, weight, reference):
    torch.manual_seed(3)
    model = get_peft_model(
        tiny.model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    sharded = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    if mode == "fsdp2-checkpointing":
        sharded["fsdp_config"]["activation_checkpointing"] = True
    arguments = TrainingArguments(
        folder, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, max_steps=STEPS, optim="sgd",
        learning_rate=1e-3, max_grad_norm=0.0, logging_steps=1, per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulate, **(sharded if mode.startswith("fsdp2") else {}),
    )  # fmt: skip
    if mode.startswith("fsdp2"):
        # accelerate shards on GPUs alone, for no other reason than this name; the rest of its path is the same on CPUs.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    gradients = FirstGradients()
    rows = ChatDataset(tiny.conversations(24), tiny.tokenizer())
    penalty = KLPenalty(model, weight) if reference == "kl" else tiny.penalty(weight, reference=reference)
    trainer = BlockTrainer(model, arguments, PaddingCollator(0), rows, penalty=penalty, callbacks=[gradients])
    trainer.train()
    assert is_sharded(trainer.model_wrapped) == mode.startswith("fsdp2")
    return {
        "gradients": gradients.found,
        "end": whole({name: p for name, p in trainer.model.named_parameters() if p.requires_grad}),
        "logs": [row[key] for row in trainer.state.log_history if "loss" in row for key in LOGGED if key in row],
    }


if __name__ == "__main__":
    folder, mode, micro, accumulate = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    reference = sys.argv[5] if len(sys.argv) > 5 else "live"
    reference = reference if reference in ("live", "kl") else open_cache(reference)
    torch.set_num_threads(1)
    results = {weight: train(folder, mode, micro, accumulate, weight, reference) for weight in (0.0, 500.0)}
    if PartialState().is_main_process:
        torch.save(results, f"{folder}/result.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
