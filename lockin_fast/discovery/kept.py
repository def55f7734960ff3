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


class AppendedLines:
    """Rows of an append-only JSONL file, of which a kill costs those that were being written.

    What a kill left of a line is left out, and cut off before the first row is added: opening the file changes nothing.
    Raises RunError for any other damage.
    """

    WHAT, REMEDY = "a row", "written again"  # of a damaged line: what it should have been, what happens without it

    def __init__(self, path: Path):
        self.path = path
        content = path.read_bytes() if path.exists() else b""
        self._whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[: self._whole].splitlines(), 1):
            try:
                self._know(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise RunError(
                    f"{path}: line {number} is not {self.WHAT} ({error!r}); remove the line, and it is {self.REMEDY}"
                ) from error

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write `rows` and flush them to the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.truncate(self._whole)
            file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
            self._whole = file.tell()
        for row in rows:
            self._know(row)

    def _know(self, row: Mapping[str, Any]) -> None:
        raise NotImplementedError


class ReplyLog(AppendedLines):
    """Judged replies, known by what COLUMNS say of them.

    A line is {"side", "latent", "strength", "prompt", "reply", "misaligned", "incoherent", "refused"}: the side of the
    screen (induce: the base model; repair: the misaligned one), the latent and the strength it was steered with (null
    and 0: not at all), and the index of the prompt among the core prompts. Rates are null where no judge gave a rating.
    """

    COLUMNS = ("side", "latent", "strength", "prompt")
    WHAT, REMEDY = "a judged reply", "answered again"

    def __init__(self, path: Path):
        self.ratings: dict[tuple, Rating] = {}
        super().__init__(path)

    def _know(self, row: Mapping[str, Any]) -> None:
        key = tuple(row[column] for column in self.COLUMNS)
        rates = [row["misaligned"], row["incoherent"], row["refused"]]
        self.ratings[key] = NO_RATING if None in rates else Rating(*rates)
