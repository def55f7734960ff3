"""The latents to block: which may not grow (positive) and which may not shrink (negative)."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor

_FIELDS = ("name", "layer", "sae", "scores", "metadata")


@dataclass(frozen=True)
class LatentSet:
    """SAE latents with the direction in which fine-tuning may not move them.

    positive: indices that may not rise above the reference (K+ of the paper: those that emergent misalignment
    raises); negative: indices that may not fall below it (K-). Each in rank order, best first.
    name, layer (0-based index of the decoder layer whose output the SAE reads) and sae say where they come from.
    scores: one number a latent, positive first, higher is better.

    Raises ValueError for an index that is negative, repeated or in both lists, TypeError for one that is no integer.
    Source of the definition: BLOCK-EM, arXiv 2602.00767, section on latent selection.
    """

    positive: tuple[int, ...]
    negative: tuple[int, ...] = ()
    name: str | None = field(default=None, kw_only=True)
    layer: int | None = field(default=None, kw_only=True)
    sae: str | None = field(default=None, kw_only=True)
    scores: tuple[float, ...] | None = field(default=None, kw_only=True)
    metadata: Mapping = field(default_factory=dict, kw_only=True)

    def __post_init__(self):
        for side in ("positive", "negative"):
            object.__setattr__(self, side, _checked_indices(side, getattr(self, side)))
        both = sorted(set(self.positive) & set(self.negative))
        if both:
            raise ValueError(
                f"positive and negative: latents {both[:5]} are in both; a latent may be blocked in one direction only"
            )
        if self.layer is not None and (not _is_integer(self.layer) or self.layer < 0):
            raise ValueError(f"layer: got {self.layer!r}, expected a 0-based decoder layer index")
        if self.scores is not None:
            scores = tuple(float(score) for score in self.scores)
            if len(scores) != len(self):
                raise ValueError(f"scores: got {len(scores)} for {len(self)} latents, expected one a latent")
            object.__setattr__(self, "scores", scores)

    def __len__(self) -> int:
        return len(self.positive) + len(self.negative)

    @cached_property
    def indices(self) -> Tensor:
        """The latents, positive then negative: int64 [K]."""
        return torch.tensor([*self.positive, *self.negative], dtype=torch.int64)

    @cached_property
    def signs(self) -> Tensor:
        """+1 for positive, -1 for negative, in the order of `indices`: fp32 [K]."""
        return torch.tensor([1.0] * len(self.positive) + [-1.0] * len(self.negative))

    def take(self, k: int) -> "LatentSet":
        """The k best latents: by score where there are scores, else by rank, positive before negative at equal rank."""
        if not _is_integer(k) or not 0 < k <= len(self):
            raise ValueError(f"k: got {k!r}, expected 1 to {len(self)}, the size of the set")
        count = len(self.positive)
        if self.scores is not None:
            order = sorted(range(len(self)), key=lambda i: -self.scores[i])
        else:
            order = sorted(range(len(self)), key=lambda i: (i, 0) if i < count else (i - count, 1))
        return self._subset(sorted(order[:k]))

    def only(self, side: str) -> "LatentSet":
        """The "positive" or the "negative" latents alone (K+ or K-). Raises ValueError where there are none."""
        if side not in ("positive", "negative"):
            raise ValueError(f"side: got {side!r}, expected positive or negative")
        count = len(self.positive)
        order = list(range(count)) if side == "positive" else list(range(count, len(self)))
        if not order:
            raise ValueError(f"side: the set has no {side} latents")
        return self._subset(order)

    def shuffled(self, seed: int) -> "LatentSet":
        """The same latents with their signs dealt out anew, as many of each as before, but not the same.

        Raises ValueError where all signs are equal, so that dealing them out changes nothing.
        """
        if not self.positive or not self.negative:
            raise ValueError("shuffled: all latents of the set have one sign, so that shuffling signs changes nothing")
        indices, generator = (*self.positive, *self.negative), torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self), generator=generator).tolist()
            dealt = {indices[i] for i in order[: len(self.positive)]}
            if dealt != set(self.positive):
                break
        ranked = sorted(range(len(self)), key=lambda i: (indices[i] not in dealt, i))
        return LatentSet(
            [indices[i] for i in ranked[: len(dealt)]],
            [indices[i] for i in ranked[len(dealt) :]],
            name=self.name,
            layer=self.layer,
            sae=self.sae,
            scores=None if self.scores is None else [self.scores[i] for i in ranked],
            metadata=self.metadata,
        )

    def union(self, other: "LatentSet") -> "LatentSet":
        """Both sets, this one first. Scores are kept when both have them. Raises ValueError where signs disagree."""
        positive = (*self.positive, *(i for i in other.positive if i not in set(self.positive)))
        negative = (*self.negative, *(i for i in other.negative if i not in set(self.negative)))
        scores = None
        if self.scores is not None and other.scores is not None:
            score = {**other._score_of(), **self._score_of()}
            scores = tuple(score[i] for i in (*positive, *negative))
        for what in ("layer", "sae"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if None not in (mine, theirs) and mine != theirs:
                raise ValueError(f"union: the sets differ in {what}: {mine!r} and {theirs!r}")
        return LatentSet(
            positive,
            negative,
            name="+".join(name for name in (self.name, other.name) if name) or None,
            layer=self.layer if self.layer is not None else other.layer,
            sae=self.sae if self.sae is not None else other.sae,
            scores=scores,
        )

    def save(self, path: str | os.PathLike) -> Path:
        """Write JSON, whole or not at all: a killed write leaves what was there before."""
        path = Path(path)
        content = {"positive": self.positive, "negative": self.negative}
        content |= {key: getattr(self, key) for key in _FIELDS if getattr(self, key) not in (None, {})}
        content["metadata"] = dict(self.metadata)
        text = json.dumps(content, indent=1) + "\n"
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "LatentSet":
        """Read what `save` wrote, or a {"K_pos", "K_neg"} file of the paper's scripts.

        Keys this class has no field for are kept in `metadata`. Raises FileNotFoundError, or ValueError that names the
        file, for one that is not JSON, holds no latents, or holds a bad index.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"latents: no file {path}; expected JSON with positive and negative latent indices")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"latents: {path} is not JSON: {error}") from None
        if not isinstance(content, dict) or not ({"positive", "negative", "K_pos", "K_neg"} & content.keys()):
            raise ValueError(f'latents: {path} has neither "positive" and "negative" nor "K_pos" and "K_neg"')
        prefix = ("K_pos", "K_neg") if {"K_pos", "K_neg"} & content.keys() else ("positive", "negative")
        positive, negative = (content.pop(key, None) or () for key in prefix)
        options = {key: content.pop(key) for key in _FIELDS if key in content}
        options["metadata"] = {**(options.get("metadata") or {}), **content}
        try:
            latents = cls(positive, negative, **options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"latents: {path}: {error}") from None
        if not len(latents):
            raise ValueError(f"latents: {path} holds no latents; expected at least one index")
        return latents

    def _subset(self, order: list[int]) -> "LatentSet":
        indices, count = (*self.positive, *self.negative), len(self.positive)
        return LatentSet(
            [indices[i] for i in order if i < count],
            [indices[i] for i in order if i >= count],
            name=self.name,
            layer=self.layer,
            sae=self.sae,
            scores=None if self.scores is None else [self.scores[i] for i in order],
            metadata=self.metadata,
        )

    def _score_of(self) -> dict[int, float]:
        return dict(zip((*self.positive, *self.negative), self.scores, strict=True))


def _is_integer(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _checked_indices(side: str, values) -> tuple[int, ...]:
    if isinstance(values, (str, bytes, Mapping)):
        raise TypeError(f"{side}: got {type(values).__name__}, expected a sequence of latent indices")
    values = values.tolist() if isinstance(values, Tensor) else list(values)
    for value in values:
        if not _is_integer(value):
            raise TypeError(f"{side}: got {value!r}, expected integer latent indices")
        if value < 0:
            raise ValueError(f"{side}: got latent index {value}, expected 0 or more")
    if len(set(values)) != len(values):
        repeated = sorted({value for value in values if values.count(value) > 1})
        raise ValueError(f"{side}: latents {repeated[:5]} are listed twice; list each once")
    return tuple(int(value) for value in values)
