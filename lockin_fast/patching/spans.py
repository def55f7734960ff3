"""Position sets: which tokens of a prompt and of its reply a patch covers."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant")
WHOLE = ("prefix", "last", "generated", "all")
_RANGE = re.compile(r"(-?\d*)\.\.(-?\d*)")  # YAML reads 3:8 as a number of base 60


def check_positions(name: str) -> None:
    """Raise ValueError unless `name` is a position set: prefix, last, generated, all, a role, or a range "3..8"."""
    found = _RANGE.fullmatch(name)
    if name in WHOLE + ROLES or (found and name != ".."):
        return
    raise ValueError(f"got {name!r}, expected {', '.join(WHOLE + ROLES)}, or a range of prompt tokens such as 3..8")


def covers_reply(name: str) -> bool:
    """Whether the set holds the tokens of the reply, each of which is patched as soon as it is there."""
    return name in ("generated", "all")


@dataclass(frozen=True)
class PromptTokens:
    """A rendered prompt: its tokens, and where each role's turns lie in them."""

    ids: Sequence[int]
    turns: Mapping[str, Sequence[int]] | None  # role -> positions; None where the chat template hides them

    def positions(self, name: str) -> list[int]:
        """The tokens of the prompt that the position set of this name covers, none where it has none of them."""
        length = len(self.ids)
        if name in ("prefix", "all"):
            return list(range(length))
        if name == "last":
            return [length - 1]
        if name == "generated":
            return []
        if name in ROLES:
            if self.turns is None:
                raise ValueError(
                    f"{name}: the tokenizer's chat template renders turns differently once more follow, so that they "
                    "cannot be told apart; give ranges of tokens such as 3..8, prefix or last"
                )
            return list(self.turns.get(name, ()))
        first, last = _RANGE.fullmatch(name).groups()
        return list(range(length))[slice(int(first) if first else None, int(last) if last else None)]


def render(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> PromptTokens:
    """Tokens of a chat prompt with its generation prompt, which counts as the assistant's, each message as its role's.

    A token belongs to every message whose text it overlaps; what a template writes before the first message is that
    message's. Raises ValueError for a slow tokenizer, which does not say where its tokens stand.
    """
    whole = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer: {type(tokenizer).__name__} is a slow one; position sets need a fast tokenizer")
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    heads = [tokenizer.apply_chat_template(list(messages[: i + 1]), tokenize=False) for i in range(len(messages))]
    if not all(map(whole.startswith, heads)):
        return PromptTokens(encoded["input_ids"], None)
    turns: dict[str, list[int]] = {}
    roles = [*(message["role"] for message in messages), "assistant"]
    for role, begin, end in zip(roles, [0, *map(len, heads)], [*map(len, heads), len(whole)], strict=True):
        inside = [t for t, (first, last) in enumerate(encoded["offset_mapping"]) if first < end and last > begin]
        turns[role] = sorted({*turns.get(role, ()), *inside})
    return PromptTokens(encoded["input_ids"], turns)
