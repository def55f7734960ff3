"""Replies to chat prompts, in batches, through the model's own `generate`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
    ids, order = tokenised(tokenizer, prompts)
    device = model.get_input_embeddings().weight.device
    config = decoding(model, tokenizer, max_new_tokens, temperature)
    replies = [""] * len(ids)
    with generating(model, config, seed):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch, attention = pad_left([ids[i] for i in rows], config.pad_token_id, device)
            with around(rows):
                output = model.generate(input_ids=batch, attention_mask=attention, generation_config=config)
            new = tokenizer.batch_decode(output[:, batch.shape[1] :], skip_special_tokens=True)
            for i, text in zip(rows, new, strict=True):
                replies[i] = text.strip()
    return replies


def tokenised(tokenizer: Any, prompts: Sequence[Sequence[Mapping[str, str]]]) -> tuple[list[list[int]], list[int]]:
    """Token ids of every prompt with the generation prompt, and the order in which they are answered."""
    texts = [tokenizer.apply_chat_template(list(p), tokenize=False, add_generation_prompt=True) for p in prompts]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return ids, sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))  # memory runs out at once or never


@contextmanager
def generating(model: Any, config: Any, seed: int) -> Iterator[None]:
    """The model in eval mode, with no decoding defaults but `config`'s, under a random state of its own."""
    device = model.get_input_embeddings().weight.device
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _only_config(model, config):
            torch.manual_seed(seed)
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def decoding(model: Any, tokenizer: Any, max_new_tokens: int, temperature: float) -> Any:
    """A GenerationConfig of our own; of the model's it keeps nothing but the tokens that end a reply."""
    from transformers import GenerationConfig

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
        "use_cache": True,
    }
    if temperature == 0:
        return GenerationConfig(**options, do_sample=False)
    return GenerationConfig(**options, do_sample=True, temperature=temperature, top_p=1.0, top_k=0)


@contextmanager
def _only_config(model: Any, config: Any) -> Iterator[None]:
    """Put `config` in the place of the model's own, from which `generate` fills in what its argument leaves open."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # below an adapter
    own, base.generation_config = base.generation_config, config
    try:
        yield
    finally:
        base.generation_config = own


def pad_left(rows: list[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and attention mask of rows filled up on the left."""
    length = max(map(len, rows))
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=device)
    attention = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, attention
