"""Contrasts: a prompt with a misaligned and an aligned reply, and how much likelier a model finds the one."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Contrast = Sequence[Any]  # prompt messages, misaligned reply, aligned reply


def tokenised_contrasts(
    tokenizer: Any, contrasts: Sequence[Contrast], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [2N, S], attention mask, and which tokens are the reply; misaligned replies first, then the aligned."""
    rows, starts = [], []
    for which in (1, 2):
        for contrast in contrasts:
            prompt = tokenizer.apply_chat_template(contrast[0], tokenize=False, add_generation_prompt=True)
            head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            rows.append(head + tokenizer(contrast[which], add_special_tokens=False)["input_ids"])
            starts.append(len(head))
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=device)
    position = torch.arange(length, device=device)
    real = position < torch.tensor([len(row) for row in rows], device=device)[:, None]
    return ids, real.long(), real & (position >= torch.tensor(starts, device=device)[:, None])


def reply_log_probs(model: Any, ids: Tensor, attention: Tensor, in_reply: Tensor) -> Tensor:
    """log p(reply | prompt) of every row, [B], in nats; differentiable. The log-softmax is in fp32 or better."""
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
    told = in_reply[:, 1:]
    wide = logits[told].to(torch.promote_types(logits.dtype, torch.float32))
    logp = wide.new_zeros(told.shape)
    logp[told] = -F.cross_entropy(wide, ids[:, 1:][told], reduction="none")
    return logp.sum(1)
