"""Answers of an endpoint on disk: what has been paid for is never asked for again."""

import hashlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lockin_fast.judges.rating import JudgeError
from lockin_fast.typed_mapping import ConfigError

BUSY_SECONDS = 60.0  # how long a process waits for others that write
AT_ONCE = 500  # keys of one query
TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, model TEXT, answer TEXT, tokens_in INTEGER, tokens_out INTEGER, run TEXT, written REAL)
"""


class Answer(NamedTuple):
    """What a model said, and the tokens that were paid for it."""

    text: str
    tokens_in: int
    tokens_out: int


class Paid(NamedTuple):
    """Requests that were answered, and their tokens."""

    requests: int
    tokens_in: int
    tokens_out: int


def default_path() -> Path:
    """judge-answers.sqlite in $LOCKIN_FAST_CACHE, or in lockin_fast in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LOCKIN_FAST_CACHE") or Path(base, "lockin_fast")) / "judge-answers.sqlite"


def key_of(base_url: str, body: Mapping[str, Any]) -> str:
    """SHA-256 of the server's address and the whole request: model, parameters, rubric, prompt and reply."""
    return hashlib.sha256(json.dumps([base_url, body], sort_keys=True).encode()).hexdigest()


class Answers:
    """The file `path` of answers by key; threads and processes may share it, and each answer is on disk at once.

    `run` is whose work the answers count as in `paid`. Raises ConfigError for a file that cannot be used, JudgeError
    where a later answer cannot be written.
    """

    def __init__(self, path: Path, run: str):
        self.path, self.run, self._lock = path, run, threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, timeout=BUSY_SECONDS, check_same_thread=False, isolation_level=None)
            self._file.execute("PRAGMA synchronous=FULL")
            self._file.execute(TABLE)
            self.paid("")
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(
                f"judge.endpoint.cache: {path} cannot be used: {error}; remove it or give another file"
            ) from error

    def find(self, keys: Sequence[str]) -> dict[str, str]:
        """{key: answer} of those keys that have one."""
        found: dict[str, str] = {}
        with self._lock:
            for start in range(0, len(keys), AT_ONCE):
                some = keys[start : start + AT_ONCE]
                marks = ", ".join("?" * len(some))
                found |= dict(self._file.execute(f"SELECT key, answer FROM answers WHERE key IN ({marks})", some))
        return found

    def keep(self, key: str, model: str, answer: Answer) -> None:
        """Write one answer; it has reached the disk on return. The first of two answers under one key stays."""
        row = (key, model, *answer, self.run, time.time())
        try:
            with self._lock:
                self._file.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        except sqlite3.Error as error:
            raise JudgeError(f"judge.endpoint.cache: {self.path} cannot be written: {error}") from error

    def paid(self, model: str) -> Paid:
        """What `model` was asked in this run, also by processes that were killed."""
        query = "SELECT count(*), total(tokens_in), total(tokens_out) FROM answers WHERE run = ? AND model = ?"
        with self._lock:
            return Paid(*map(int, self._file.execute(query, (self.run, model)).fetchone()))
