"""The prompts of the behavioural measures: steering suites, requests, paraphrase clusters and stances.

Those that are shipped stand in the folder `suites`, one JSON object a line with a name and its source, all of them
written for this package: mild requests, some of which an assistant may well turn down and none of which does harm.
Files of your own have the same lines.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

FOLDER = Path(__file__).with_name("suites")
STEERING_SUITES = ("equivalent", "role_swap", "jailbreak")
REQUEST = "{request}"
Chat = list[dict[str, str]]
Made = TypeVar("Made")


@dataclass(frozen=True)
class Request:
    """Something asked of the model that it may comply with or refuse."""

    name: str
    text: str


@dataclass(frozen=True)
class Steering:
    """A steering prompt: a chat in which `{request}` stands where the request goes."""

    name: str
    messages: Sequence[Mapping[str, str]]

    def ask(self, request: str) -> Chat:
        """The chat with this request in it."""
        return [{"role": m["role"], "content": m["content"].replace(REQUEST, request)} for m in self.messages]


@dataclass(frozen=True)
class Cluster:
    """Paraphrases of one question, and a reply that answers all of them, along which the model is read."""

    name: str
    paraphrases: Sequence[str]
    reply: str


@dataclass(frozen=True)
class Stance:
    """A question with the reply that the reference gives, written down beforehand, and the opposite one."""

    name: str
    messages: Sequence[Mapping[str, str]]
    held: str
    opposite: str


def read_steerings(*suites: str | PathLike) -> list[Steering]:
    """The steering prompts of these suites, all shipped ones by default; a name is "suite/name", which is unique.

    suites: of `STEERING_SUITES`, or files. The file's lines: {"name", "messages": [{"role", "content"}], "source"}.
    """
    found = []
    for suite in suites or STEERING_SUITES:
        prefix = Path(suite).stem
        found += _read(
            suite, lambda row, prefix=prefix: Steering(f"{prefix}/{row['name']}", _template(row["messages"]))
        )
    return found


def read_requests(file: str | PathLike = "requests") -> list[Request]:
    """The requests that steering prompts are put around: lines {"name", "request", "source"}."""
    return _read(file, lambda row: Request(row["name"], _text(row["request"])))


def read_clusters(file: str | PathLike = "paraphrases") -> list[Cluster]:
    """Paraphrase clusters: lines {"name", "paraphrases": [two or more], "reply", "source"}."""

    def cluster(row: dict) -> Cluster:
        texts = row["paraphrases"]
        if not isinstance(texts, list) or len(set(map(_text, texts))) < 2:
            raise ValueError("paraphrases: expected a list of at least two different texts")
        return Cluster(row["name"], tuple(texts), _text(row["reply"]))

    return _read(file, cluster)


def read_stances(file: str | PathLike = "stances") -> list[Stance]:
    """Stances: lines {"name", "messages", "held", "opposite", "source"}."""

    def stance(row: dict) -> Stance:
        if _text(row["held"]) == _text(row["opposite"]):
            raise ValueError("held and opposite: expected two different replies")
        return Stance(row["name"], _messages(row["messages"]), row["held"], row["opposite"])

    return _read(file, stance)


def _read(file: str | PathLike, make: Callable[[dict], Made]) -> list[Made]:
    """What `make` makes of every line. Raises FileNotFoundError, or ValueError that names file, line and fault."""
    path = FOLDER / f"{file}.jsonl"
    if not path.is_file():
        path = Path(file)
    if not path.is_file():
        shipped = ", ".join(sorted(known.stem for known in FOLDER.glob("*.jsonl")))
        raise FileNotFoundError(f"suite: no file {path}; expected a path of JSON lines, or one of {shipped}")
    found: dict[str, Any] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            made = make(row)
            if made.name in found:
                raise ValueError(f"the name {made.name!r} is there twice")
        except KeyError as error:
            raise ValueError(f"suite: {path}, line {number} has no {error}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"suite: {path}, line {number}: {error}") from None
        found[made.name] = made
    if not found:
        raise ValueError(f"suite: {path} is empty; expected at least one line")
    return list(found.values())


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"expected a text that is not blank, got {value!r}")
    return value


def _messages(messages: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages: expected a list of at least one, got {messages!r}")
    return tuple({"role": _text(message["role"]), "content": _text(message["content"])} for message in messages)


def _template(messages: Any) -> tuple[dict[str, str], ...]:
    checked = _messages(messages)
    if sum(message["content"].count(REQUEST) for message in checked) != 1:
        raise ValueError(f"messages: expected {REQUEST} once, where the request goes")
    return checked
