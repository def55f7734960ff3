"""What the caller of :func:`load_sae` asked for, as every reader receives it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lockin_fast.sae.latents import as_latents


@dataclass(frozen=True)
class ReadOptions:
    """``latents``: the rows to read, None for all. ``input_scale``: the scalar of ``expected_average_only_in``.
    ``fold_decoder_norm``: z in units of unit decoder rows; None leaves it to the format."""

    latents: Tensor | Sequence[int] | None = None
    input_scale: float | None = None
    fold_decoder_norm: bool | None = None

    def index(self, width: int) -> Tensor | None:
        return None if self.latents is None else as_latents(self.latents, width)


def read_json(path: Path) -> dict:
    """A JSON object, or a ValueError that names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def check_k(k, width: int, path: Path) -> int:
    """k of a top-k as an integer from 1 to ``width``; some files store it as a float."""
    whole = isinstance(k, int) and not isinstance(k, bool) or isinstance(k, float) and k.is_integer()
    if not whole or not 1 <= k <= width:
        raise ValueError(f"{path}: k must be an integer from 1 to {width}, got {k!r}")
    return int(k)


def refuse_input_scale(options: ReadOptions, path: Path, reason: str) -> None:
    if options.input_scale is not None:
        raise ValueError(f"{path}: input_scale={options.input_scale} does not apply: {reason}")
