import pytest
import torch

from lockin_fast import patch_

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (4, 48), (31, 123), (64, 2304), (9, 4096)]


def inputs(tokens, width, dtype, seed=0):
    """h [N, d], distinct rows [P], source [P, d]."""
    make = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, width, generator=make).to(dtype)
    rows = torch.randperm(tokens, generator=make)[: (tokens + 1) // 2]
    return h, rows, torch.randn(rows.shape[0], width, generator=make).to(dtype)


def patched(h, rows, source):
    """The oracle: one row after the other."""
    out = h.clone()
    for row, new in zip(rows.tolist(), source, strict=True):
        out[row] = new
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_listed_rows_are_written_and_no_others(dtype, shape):
    h, rows, source = inputs(*shape, dtype)
    expected = patched(h, rows, source)
    assert patch_(h, rows, source) is h
    assert torch.equal(h, expected)
