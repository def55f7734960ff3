"""The prompts that trained models answer, and who rates the answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lockin_fast.chat import question, read_chat
from lockin_fast.config import Config, naming
from lockin_fast.judges import load_judge

__all__ = ["Exam", "open_exam", "question"]


@dataclass(frozen=True)
class Exam:
    """The prompts every trial answers, and who rates the answers."""

    prompts: Mapping[str, list[dict]]  # such as "final" -> records of the JSONL file
    judge: Any  # what `rate` takes: a Judge, or the panel that `load_judge` returns


def open_exam(config: Config, *names: str) -> Exam:
    """Open the prompts data.`name` of each name, and the judge. Raises ConfigError naming the setting."""
    prompts = {name: read_prompts(config, name) for name in names}
    with naming("judge"):
        judge = load_judge(config.judge, str(config.output or ""))
    for name, records in prompts.items():
        with naming(f"data.{name}"):
            judge.check(records)  # a prompt the judge cannot place is an error now, not after training
    return Exam(prompts, judge)


def read_prompts(config: Config, name: str) -> list[dict]:
    """The prompts data.`name`, as records. Raises ConfigError naming the setting."""
    with naming(f"data.{name}"):
        records = read_chat(getattr(config.data, name))
        for number, record in enumerate(records, 1):
            if not question(record):
                raise ValueError(f"conversation {number} asks nothing: it has no turn before the assistant's")
    return records
