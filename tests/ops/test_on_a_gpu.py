"""What only a GPU can show of the ops: the stream they work in, that nothing waits, and rows beyond 2^31 elements."""

import pytest
import torch

import lockin_fast
from lockin_fast import dispatch

pytestmark = pytest.mark.gpu
SLEEP = 200_000_000  # cycles: about a tenth of a second


def calls(tokens=64, width=256, latents=5):
    """h on the GPU, and by name what is called on it."""
    with torch.device("cuda"):
        h, source = torch.randn(tokens, width).bfloat16(), torch.randn(tokens, width).bfloat16()
        weight, bias, sign = torch.randn(latents, width), torch.randn(latents), torch.ones(latents)
        rows, z_ref = torch.arange(tokens), torch.zeros(tokens, latents)
        coefficient = torch.ones(tokens)
    return h, {
        "block_penalty": lambda: lockin_fast.block_penalty(h, weight, bias, sign, z_ref=z_ref).total,
        "encode_latents": lambda: lockin_fast.encode_latents(h, weight, bias),
        "patch_": lambda: lockin_fast.patch_(h, rows, source),
        "patch_diff": lambda: lockin_fast.patch_diff(h, rows, source, weight, bias).latents,
        "quantize_nf4": lambda: lockin_fast.quantize_nf4(h).dequantize(torch.bfloat16),
        "steer_": lambda: lockin_fast.steer_(h, weight, rows % latents, coefficient),
    }


NAMES = ["block_penalty", "encode_latents", "patch_", "patch_diff", "quantize_nf4", "steer_"]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_gpu(name):
    call = calls()[1][name]
    call()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
def test_the_current_stream_is_the_one_worked_in(name):
    h, made = calls()
    call, kept = made[name], h.clone()
    expected = call().clone()
    h.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        h.copy_(kept)  # a kernel in any other stream would see the zeros
        got = call().clone()
    stream.synchronize()
    assert torch.equal(got, expected)


def test_offsets_beyond_what_31_bits_hold():
    width = 4096
    tokens = 2**31 // width + 3
    if torch.cuda.mem_get_info()[0] < 3 * tokens * width * 2:
        pytest.skip("needs 13 GB of free GPU memory")
    with torch.device("cuda"):
        h = torch.zeros(tokens, width, dtype=torch.bfloat16)
        source, rows = torch.ones(2, width, dtype=torch.bfloat16), torch.tensor([tokens - 1, 1])
        weight = torch.eye(3, width)
    lockin_fast.patch_(h, rows, source)
    assert (h[rows] == 1).all() and h[2:-1].any().logical_not()
    assert (lockin_fast.patch_diff(h, rows, 2 * source, weight).projection == 1).all()
    lockin_fast.steer_(h[None], weight, torch.tensor([0], device="cuda"), torch.tensor([1.0], device="cuda"))
    assert (h[rows, 0] == 2).all() and h[-2, 0] == 1
    alone = lockin_fast.quantize_nf4(h[-1:]).dequantize()
    assert torch.equal(lockin_fast.quantize_nf4(h).dequantize()[-1:], alone)


def test_the_cuda_part_serves_when_forced():
    if dispatch.FORCED != "cuda":
        pytest.skip("LOCKIN_FAST_BACKEND=cuda is not set")
    assert "cuda" in {row.backend for row in lockin_fast.backends() if row.device == "cuda"}
