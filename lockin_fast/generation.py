"""Replies to chat prompts, in batches, through the model's own `generate`."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Mapping[str, str]]],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    seed: int = 0,
    around: Callable[[list[int]], AbstractContextManager] = lambda rows: nullcontext(),
) -> list[str]:
    """Return one reply for each prompt (a list of chat messages), in the order of `prompts`.

    Prompts are rendered with the chat template and its generation prompt, sorted by length so that a batch carries
    little padding, and padded on the left. `temperature` 0 is greedy; otherwise the whole distribution is
    sampled from, under `seed`, and the caller's random state is left as it was. The reply is the new tokens only,
    without special tokens. The model is in eval mode meanwhile and back in its own mode afterwards. `around` is given
    the positions in `prompts` of a batch's rows, in the batch's order; the batch is generated inside what it returns.
    """
    if not prompts:
        return []
    texts = [tokenizer.apply_chat_template(list(p), tokenize=False, add_generation_prompt=True) for p in prompts]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))  # longest first: memory runs out at once or never
    device = model.get_input_embeddings().weight.device
    options = _decoding_options(model, tokenizer, max_new_tokens, temperature)
    replies = [""] * len(ids)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                batch, attention = _pad_left([ids[i] for i in rows], options["pad_token_id"], device)
                with around(rows):
                    output = model.generate(input_ids=batch, attention_mask=attention, **options)
                new = tokenizer.batch_decode(output[:, batch.shape[1] :], skip_special_tokens=True)
                for i, text in zip(rows, new, strict=True):
                    replies[i] = text.strip()
    finally:
        for module, training in modes.items():
            module.training = training
    return replies


def _decoding_options(model: Any, tokenizer: Any, max_new_tokens: int, temperature: float) -> dict[str, Any]:
    """Arguments of `generate` that say everything about sampling, so that the model's own defaults cannot interfere."""
    end = model.generation_config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end  # chat models may name several ends; a tokenizer knows one
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = end[0] if isinstance(end, (list, tuple)) else end
    options = {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": end,
        "pad_token_id": 0 if pad is None else pad,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "use_cache": True,
    }
    if temperature == 0:
        return options | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return options | {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}


def _pad_left(rows: list[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=device)
    attention = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, attention
