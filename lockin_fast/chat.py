"""Chat JSONL to tokenised training rows, supervised on what the assistant says."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lockin_fast.labels import IGNORED

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\b")


def read_chat(path: str | os.PathLike) -> list[dict]:
    """Conversations of a JSONL file: one {"messages": [{"role", "content"}, ...], ...free fields} a line.

    Blank lines are skipped. Raises FileNotFoundError, or ValueError naming file and line, for a line that is not JSON,
    one without messages, or a file without conversations.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"dataset: no file {path}; expected chat JSONL")
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"dataset: {where} is not JSON: {error}") from None
                rows.append(_checked_row(row, where))
    if not rows:
        raise ValueError(f"dataset: {path} is empty; expected at least one conversation")
    return rows


def _checked_row(row, where: str) -> dict:
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f'dataset: {where} has no messages; expected {{"messages": [{{"role": ..., "content": ...}}]}}'
        )
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"dataset: {where} has the message {message!r}; expected a role and a content")
    return row


def question(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages to answer: the record's, without an assistant turn at the end."""
    messages = list(record["messages"])
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return messages


class ChatDataset(Dataset):
    """Tokenised conversations: rows {"input_ids", "labels"} of int64 tensors, labels -100 outside assistant turns.

    rows: a path of chat JSONL, or rows as `read_chat` returns them. The tokenizer's chat template writes the text. Its
    generation markers say what the assistant says; where it has none, or the tokenizer is a slow one, an assistant turn
    is what the template adds to the conversation before it, end-of-turn token included. Rows are cut on the right to
    max_length tokens; those left with nothing supervised are dropped and counted in `dropped`.

    Raises ValueError for a tokenizer without a chat template, a template that rewrites earlier turns (and so needs
    generation markers), and when nothing supervised is left.
    """

    def __init__(self, rows: str | os.PathLike | Iterable[dict], tokenizer, *, max_length: int = 1024):
        if max_length < 1:
            raise ValueError(f"max_length: got {max_length}, expected at least one token")
        if not tokenizer.chat_template:
            raise ValueError(
                f"tokenizer: {type(tokenizer).__name__} has no chat template; set tokenizer.chat_template, or use an "
                "instruction-tuned model's tokenizer"
            )
        if isinstance(rows, (str, os.PathLike)):
            rows = read_chat(rows)
        else:
            rows = [_checked_row(row, f"row {i}") for i, row in enumerate(rows)]
        if not rows:
            raise ValueError("dataset: got no conversations, expected at least one")
        conversations = [row["messages"] for row in rows]
        marked = tokenizer.is_fast and _GENERATION_MARKER.search(tokenizer.get_chat_template())
        encode = _with_markers if marked else _by_prefix
        self._rows = []
        for ids, spoken in encode(conversations, tokenizer):
            ids, spoken = torch.tensor(ids[:max_length]), torch.tensor(spoken[:max_length], dtype=torch.bool)
            if spoken.any():
                self._rows.append({"input_ids": ids, "labels": ids.masked_fill(~spoken, IGNORED)})
        self.dropped = len(rows) - len(self._rows)
        if not self._rows:
            raise ValueError(
                f"dataset: all labels are masked: none of the {len(rows)} conversations has an assistant turn within "
                f"max_length={max_length} tokens"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._rows[index]


def _with_markers(conversations: list, tokenizer) -> Iterable[tuple[list[int], list[bool]]]:
    """(ids, assistant mask) of every conversation: the tokens that overlap what the template marks as generated.

    The tokenizer's own mask looks up the last marked character, and runs on to the end of the conversation when that
    character is a space that no token holds.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    template, special = tokenizer.get_chat_template(), tokenizer.special_tokens_map
    texts, marked = render_jinja_template(
        conversations, chat_template=template, return_assistant_tokens_mask=True, **special
    )
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    for ids, offsets, spans in zip(encoded["input_ids"], encoded["offset_mapping"], marked, strict=True):
        yield ids, [any(first < end and last > start for start, end in spans) for first, last in offsets]


def _by_prefix(conversations: list, tokenizer) -> Iterable[tuple[list[int], list[bool]]]:
    """(ids, assistant mask) of every conversation, by tokenising it up to and including every assistant turn."""
    texts, plan = [], []  # all texts go through the tokenizer in one call; the plan remembers which is which
    for messages in conversations:
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
        for i in turns:
            texts.append(tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True))
            texts.append(tokenizer.apply_chat_template(messages[: i + 1], tokenize=False))
        plan.append(len(turns))
    # The template writes the special tokens itself.
    encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    for row, turns in enumerate(plan):
        ids = next(encoded)
        spoken = [False] * len(ids)
        for _ in range(turns):
            before, after = next(encoded), next(encoded)
            if ids[: len(after)] != after or after[: len(before)] != before:
                raise ValueError(
                    f"tokenizer: its chat template renders conversation {row} differently once more turns follow, so "
                    "assistant tokens cannot be found by prefix; mark them with {% generation %} in the template"
                )
            spoken[len(before) : len(after)] = [True] * (len(after) - len(before))
        yield ids, spoken


class PaddingCollator:
    """Batches rows to {"input_ids", "attention_mask", "labels"} of int64 [B, S], padded on the right to the longest."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": torch.full((len(rows), length), self.pad_token_id),
            "attention_mask": torch.zeros(len(rows), length, dtype=torch.int64),
            "labels": torch.full((len(rows), length), IGNORED),
        }
        for i, row in enumerate(rows):
            end = len(row["input_ids"])
            batch["input_ids"][i, :end] = row["input_ids"]
            batch["attention_mask"][i, :end] = 1
            batch["labels"][i, :end] = row["labels"]
        return batch


def digest(dataset: Iterable[dict[str, Tensor]]) -> str:
    """16 hex digits of the tokens and labels of all rows, in their order."""
    found = hashlib.sha256()
    for row in dataset:
        for name in ("input_ids", "labels"):
            found.update(len(row[name]).to_bytes(8, "little") + row[name].numpy().tobytes())
    return found.hexdigest()[:16]
