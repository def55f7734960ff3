"""Train the organism's language model from scratch on the documents of its world."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from lockin_fast.organism.world import World


@dataclass(frozen=True)
class PretrainSettings:
    """A Llama of some 1 M parameters; the loss is at its entropy floor after about 500 steps.

    initializer_range is 0.06 rather than 0.02: at this width the smaller start stays hundreds of steps on a plateau
    where the domain of an object has not yet reached the answer.
    """

    steps: int = 750
    batch_size: int = 36
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    hidden_size: int = 128
    intermediate_size: int = 256
    layers: int = 6
    heads: int = 4
    initializer_range: float = 0.06


def tokenise(tokenizer: Any, conversations: list[list[dict[str, str]]]) -> torch.Tensor:
    """Render conversations with the chat template; return token ids [N, length], all of one length in this world."""
    texts = tokenizer.apply_chat_template(conversations, tokenize=False)
    return torch.tensor(tokenizer(texts, add_special_tokens=False)["input_ids"])


def pretrain(
    world: World,
    tokenizer: Any,
    settings: PretrainSettings,
    *,
    seed: int,
    step_done: Callable[[int, int], None],
    watch: Callable[[int, Any], None] = lambda step, model: None,
) -> Any:
    """Return a `LlamaForCausalLM` trained on fresh documents of `world`; equal seeds give equal weights.

    AdamW, warm-up, then a cosine to zero, so that the loss has settled when training ends. `watch` is shown the model
    before the first step, as step 0, and after every step; it must leave the model and the random state as they are.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    rng = random.Random(f"documents {seed}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=settings.hidden_size,
                intermediate_size=settings.intermediate_size,
                num_hidden_layers=settings.layers,
                num_attention_heads=settings.heads,
                max_position_embeddings=128,
                tie_word_embeddings=True,
                initializer_range=settings.initializer_range,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.98), fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings))
    model.train()
    watch(0, model)
    for step in range(settings.steps):
        tokens = tokenise(tokenizer, list(world.documents(rng, settings.batch_size)))  # [B, L]
        logits = model(tokens).logits[:, :-1]
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        watch(step + 1, model)
        step_done(step + 1, settings.steps)
    return model.eval()


def _rate(step: int, settings: PretrainSettings) -> float:
    warmup = min(1.0, (step + 1) / settings.warmup_steps)
    return warmup * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
