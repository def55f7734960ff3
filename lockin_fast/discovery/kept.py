"""What a discovery keeps while it runs, so that a kill costs no more than the work in hand."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lockin_fast.judges.rating import NO_RATING, Rating
from lockin_fast.rundir import RunError, write_json


def kept(path: Path, work: Callable[[], Any]) -> Any:
    """The JSON value in the file `path`: what `work()` returned when it was not there.

    It is read back even when it has just been made, so that a resumed run sees exactly what an uninterrupted one does.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, work())
    return json.loads(path.read_text(encoding="utf-8"))


class ReplyLog:
    """Judged replies in an append-only JSONL file, known by what COLUMNS say of them.

    A line is {"side", "latent", "strength", "prompt", "reply", "misaligned", "incoherent", "refused"}: the side of the
    screen (induce: the base model; repair: the misaligned one), the latent and the strength it was steered with (null
    and 0: not at all), and the index of the prompt among the core prompts. Rates are null where no judge gave a rating.
    What a kill left of a line is cut off when the file is opened. Raises RunError for any other damage.
    """

    COLUMNS = ("side", "latent", "strength", "prompt")

    def __init__(self, path: Path):
        self.path = path
        self.ratings: dict[tuple, Rating] = {}
        if not path.exists():
            return
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                self._know(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise RunError(
                    f"{path}: line {number} is not a judged reply ({error!r}); remove the line, and it is "
                    "answered again"
                ) from error

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write `rows` and flush them to the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        for row in rows:
            self._know(row)

    def _know(self, row: Mapping[str, Any]) -> None:
        key = tuple(row[column] for column in self.COLUMNS)
        rates = [row["misaligned"], row["incoherent"], row["refused"]]
        self.ratings[key] = NO_RATING if None in rates else Rating(*rates)
