"""segment_stats: each segment's sums are latent_stats of its tokens alone, whatever serves it."""

import sys

import pytest
import torch
from memory import printed
from penalty_oracle import assert_as_good_as_torch, clear_of_steps, encode, problem, rounding
from threads import on_threads

import lockin_fast
from lockin_fast.ops import _wide
from lockin_fast.ops import segment_stats as op_module
from lockin_fast.ops.segment_stats import segment_stats

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FIELDS = ("sum", "sum_squares", "count", "count_ref", "tokens")
CASES = [((70, 123, 13), (0, 1, 33, 0, 36)), ((1300, 48, 100), (600, 5, 0, 695)), ((33, 2304, 43), (33,)),
         ((9, 48, 1), (3, 3, 3))]  # fmt: skip


@pytest.mark.parametrize("ref", [None, "h"], ids=["one stream", "difference"])
@pytest.mark.parametrize(("shape", "lengths"), CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_segment_is_as_good_as_plain_torch(dtype, shape, lengths, ref):
    p = problem(*shape, dtype, ref=ref, threshold=True)
    usable = clear_of_steps(p).all(0)
    assert usable.any()
    with on_threads(3):
        sums, total = segment_stats(p.h, p.weight, p.bias, lengths, h_ref=p.h_ref, threshold=p.threshold)
    assert sums.shape == (len(lengths), shape[2]) and sums.dtype is torch.float64
    exact = p.at(torch.float64)
    least = float(rounding(exact, exact.h).max())
    start = 0
    for row, length in zip(sums, lengths, strict=True):
        part = slice(start, start + length)
        truth, yardstick = (_sums(p.at(precision), part) for precision in (torch.float64, torch.float32))
        assert_as_good_as_torch("sums", row, truth, yardstick, usable, least=least)
        assert length or not row.any()
        start += length
    assert torch.equal(total.sum, sums.sum(0)) and total.tokens == shape[0]
    whole = lockin_fast.latent_stats(p.h, p.weight, p.bias, h_ref=p.h_ref, threshold=p.threshold)
    for name in FIELDS:
        torch.testing.assert_close(getattr(total, name), getattr(whole, name), rtol=1e-5, atol=1e-5, msg=name)


def _sums(p, part):
    value = encode(p, p.h[part]) - (0 if p.h_ref is None else encode(p, p.h_ref[part]))
    return value.double().sum(0)


@pytest.mark.parametrize("ref", [None, "h"], ids=["one stream", "difference"])
def test_the_reference_agrees_and_a_weight_cast_in_parts_too(ref, monkeypatch):
    p = problem(30, 48, 77, torch.float32, ref=ref, threshold=True)
    lengths = (4, 0, 26)
    sums, total = segment_stats(p.h, p.weight, p.bias, lengths, h_ref=p.h_ref, threshold=p.threshold)
    plain = op_module.reference(p.h, p.weight, p.bias, p.h_ref, p.threshold, torch.tensor([4, 4, 30], device="cpu"))
    found = (sums, total.sum_squares, total.count, total.count_ref)
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(_wide, "CAST_ELEMENTS", 48 * 10)
    parts = segment_stats(p.h, p.weight.double(), p.bias, lengths, h_ref=p.h_ref, threshold=p.threshold)
    torch.testing.assert_close(parts.sums, sums, rtol=1e-5, atol=1e-5)
    for name in FIELDS:
        torch.testing.assert_close(getattr(parts.total, name), getattr(total, name), rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(("tokens", "latents", "lengths"), [(0, 5, ()), (0, 5, (0, 0)), (4, 0, (1, 3))])
def test_nothing_to_sum(tokens, latents, lengths, poisoned_memory):
    p = problem(tokens, 48, latents, torch.float32)
    sums, total = segment_stats(p.h, p.weight, p.bias, lengths, h_ref=p.h_ref)
    assert sums.shape == (len(lengths), latents) and not sums.any() and total.tokens == tokens
    assert not total.sum.any() and not total.sum_squares.any() and not total.count.any() and not total.count_ref.any()


def test_not_a_number_stays_in_its_segment():
    p = problem(12, 48, 6, torch.float32)
    p.h[5, 3] = float("nan")
    sums, total = segment_stats(p.h, p.weight, p.bias, (5, 2, 5), h_ref=p.h_ref)
    assert sums[1].isnan().all() and sums[[0, 2]].isfinite().all() and total.sum.isnan().all()


@pytest.mark.parametrize(
    ("lengths", "said"),
    [((5, 8), "2 lengths of 13 tokens"), ((), "0 lengths of 0 tokens"), ((13, -1), "the least -1")],
)
def test_lengths_that_are_not_the_tokens_are_refused(lengths, said):
    p = problem(12, 48, 6, torch.float32)
    with pytest.raises(ValueError, match=f"^lengths: got .*{said}.* 12 in all"):
        segment_stats(p.h, p.weight, p.bias, lengths)


def test_other_arguments_are_checked_as_those_of_latent_stats():
    p = problem(6, 48, 4, torch.float32)
    for changes, text in (
        ({"h_ref": p.h[:5]}, r"^h_ref: got torch.float32 \(5, 48\)"),
        ({"threshold": torch.zeros(5)}, r"^threshold: got shape \(5,\)"),
    ):
        with pytest.raises(ValueError, match=text):
            segment_stats(p.h, p.weight, p.bias, (6,), **changes)
    with pytest.raises(TypeError, match="^h_ref: got list, expected a tensor"):
        segment_stats(p.h, p.weight, p.bias, (6,), h_ref=[0.0])


@pytest.mark.cpu
@pytest.mark.parametrize("ends", [[2], [5, 3, 6], [-1, 6], []])
def test_the_op_refuses_ends_that_would_run_past_the_tokens(ends):
    if lockin_fast.dispatch._served.get(("segment_stats", "cpu"), ("",))[0] != "cpu":
        pytest.skip("the compiled part does not serve segment_stats here")
    p = problem(6, 48, 4, torch.float32)
    with pytest.raises(RuntimeError, match="ends must ascend to the number of tokens, 6"):
        torch.ops.lockin_fast.segment_stats(p.h, p.weight, p.bias, None, None, torch.tensor(ends, dtype=torch.int64))


MEMORY = """
from lockin_fast.ops.segment_stats import segment_stats
torch.manual_seed(0)
weight, bias = torch.randn(16384, 256), torch.zeros(16384)
h = torch.randn(2048, 256)
h_ref = h + 1
segment_stats(h[:64], weight[:64], bias[:64], [64], h_ref=h_ref[:64])
found, risen = rise(lambda: segment_stats(h, weight, bias, [256] * 8, h_ref=h_ref))
print(risen - (found.sums.nbytes + 4 * 8 * 16384) / 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_scratch_memory():
    (megabytes,) = printed(MEMORY, OMP_NUM_THREADS="1")
    assert float(megabytes) < 64  # [T, F] would be 128 MB for each stream
