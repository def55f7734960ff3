"""The scalar maths the kernels share, against plain Python and torch."""

import math
import random
import struct

import pytest
import torch

native = pytest.importorskip("lockin_fast._native", reason="the compiled part is not built")
INF, NAN = math.inf, math.nan


def fp32(x):
    return torch.tensor(x, dtype=torch.float32).item()


def expected(pre, z_ref, sign, margin, threshold):
    z = pre if pre > max(threshold, 0.0) else 0.0
    e = max(sign * (z - z_ref) - margin, 0.0)
    return e * e, 2.0 * sign * e if z > 0 else 0.0, e > 0


def test_penalty_matches_its_formula():
    rng = random.Random(0)
    for _ in range(2000):
        pre, z_ref = fp32(rng.gauss(0, 2)), fp32(abs(rng.gauss(0, 2)) * rng.choice((0, 1)))
        sign, margin = rng.choice((1.0, -1.0)), fp32(rng.choice((0.0, rng.random())))
        threshold = rng.choice((-INF, fp32(rng.random())))
        got = native.latent_penalty(pre, z_ref, sign, margin, threshold)
        want = expected(pre, z_ref, sign, margin, threshold)
        # Three roundings before the square; cancellation makes them relative to the operands, not to the result.
        slack = 4 * 2.0**-24 * (abs(pre) + z_ref + margin)
        root = math.sqrt(want[0])
        assert got[0] == pytest.approx(want[0], rel=4 * 2.0**-24, abs=2 * root * slack + slack * slack), (pre, z_ref)
        assert got[1] == pytest.approx(want[1], rel=4 * 2.0**-24, abs=2 * slack), (pre, z_ref)
        assert got[2] == want[2] or root <= slack


def test_equal_streams_cost_exactly_nothing():
    for z in (0.0, 0.1, 3.7, 1e30):
        for sign in (1.0, -1.0):
            assert native.latent_penalty(z, z, sign) == (0.0, 0.0, False)


def test_the_slope_is_the_derivative():
    step = 2.0**-8  # exact in fp32 around these values, and so is the parabola
    for pre, z_ref, sign in ((2.0, 1.0, 1.0), (1.0, 2.0, -1.0), (1.0, 2.0, 1.0)):
        up, down = (native.latent_penalty(pre + s, z_ref, sign)[0] for s in (step, -step))
        assert native.latent_penalty(pre, z_ref, sign)[1] == (up - down) / (2 * step)


def test_an_inactive_latent_passes_no_gradient():
    value, coefficient, active = native.latent_penalty(-1.0, 2.0, -1.0)
    assert (value, coefficient, active) == (4.0, 0.0, True)
    assert native.latent_penalty(0.5, 2.0, -1.0, threshold=0.6)[:2] == (4.0, 0.0)


def test_activation_thresholds_strictly_and_keeps_nan():
    assert native.activation(0.5) == 0.5
    assert native.activation(-0.5) == 0.0
    assert native.activation(0.5, 0.5) == 0.0
    assert native.activation(-0.25, -0.5) == 0.0  # a negative threshold is still behind the ReLU
    assert native.activation(INF, 0.5) == INF
    assert math.isnan(native.activation(NAN)) and math.isnan(native.activation(NAN, 0.5))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_and_inf_reach_the_penalty(sign):
    assert math.isnan(native.latent_penalty(NAN, 1.0, sign)[0])
    assert math.isnan(native.latent_penalty(1.0, NAN, sign)[0])
    assert math.isnan(native.latent_penalty(INF, INF, sign)[0])
    assert native.latent_penalty(INF, 1.0, 1.0)[0] == INF


@pytest.mark.parametrize("name, dtype", [("round_bf16", torch.bfloat16), ("round_f16", torch.float16)])
def test_storage_types_round_as_torch_does(name, dtype):
    generator = torch.Generator().manual_seed(0)
    mantissa = torch.randn(4000, generator=generator)
    exponent = torch.randint(-30, 20, (4000,), generator=generator)
    values = torch.ldexp(mantissa, exponent)
    edges = torch.tensor([0.0, -0.0, INF, -INF, 65504.0, 65519.9, 65520.0, 2.0**-14, 2.0**-24, 2.0**-25, 3 * 2.0**-25])
    values = torch.cat((values, edges, 1 + torch.arange(64) * 2.0**-12))  # the last ones hold exact ties
    round_trip = getattr(native, name)
    got = torch.tensor([round_trip(x) for x in values.tolist()])
    assert torch.equal(got, values.to(dtype).float())
    assert math.isnan(round_trip(NAN))
    assert math.isnan(round_trip(struct.unpack("<d", b"\xff" * 7 + b"\x7f")[0]))  # every bit of the payload set


def test_build_info_names_what_was_built():
    info = native.build_info()
    assert set(info) == {"version", "compiler", "build_type", "torch", "units", "cuda"}
    assert "baseline" in info["units"].split()
    assert set(native.cpu_features()) <= {"baseline", "avx2", "avx512", "avx512bf16"}
    assert native.isa() in native.cpu_features()


CODEBOOK = [native.nf4_value(code) for code in range(16)]


def nearest_code(x):
    """Smallest distance; a tie, at a boundary rounded to fp32, goes to the lower code."""
    return sum(x > fp32((low + high) / 2) for low, high in zip(CODEBOOK, CODEBOOK[1:], strict=False))


def test_nf4_codebook_is_sorted_and_has_an_exact_zero():
    assert CODEBOOK == sorted(CODEBOOK) and CODEBOOK == [fp32(x) for x in CODEBOOK]
    assert (CODEBOOK[0], CODEBOOK[7], CODEBOOK[15]) == (-1.0, 0.0, 1.0)


def test_nf4_code_is_the_nearest():
    values = torch.rand(4000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    boundaries = torch.tensor([native.nf4_boundary(i) for i in range(15)])
    beside = [torch.nextafter(boundaries, torch.full((15,), end)) for end in (-2.0, 2.0)]
    for x in torch.cat([values, boundaries, *beside, torch.tensor(CODEBOOK + [1.5, -1.5])]).tolist():
        assert native.nf4_code(x) == nearest_code(x), x
    assert native.nf4_code(NAN) == 15


def test_nf4_block_scales_by_its_largest_magnitude_and_packs_the_even_element_high():
    assert native.nf4_block([0.0, -4.0, 4.0, 0.0]) == (bytes([0x70, 0xF7]), 4.0)
    assert native.nf4_block([0.0, -0.0]) == (bytes([0x77]), 0.0)
    assert native.nf4_block([INF, 1.0, -INF, 0.0]) == (bytes([0xF7, 0xF7]), INF)
    codes, absmax = native.nf4_block([1.0, NAN])
    assert codes == bytes([0xFF]) and math.isnan(absmax)
    assert native.nf4_block([1e-45, 0.0])[1] == fp32(1e-45)  # far below what can be inverted: the code of zero
    assert native.nf4_block([1e-45, 0.0])[0] == bytes([0x77])
