"""The statistics of the shift: by hand, and against sums written out in fp64 over whole [tokens, F]."""

import math

import pytest
import torch

from lockin_fast.discovery.shift_sums import ShiftSums
from lockin_fast.ops.latent_stats import LatentStats
from lockin_fast.ops.segment_stats import SegmentStats, segment_stats


def stats_of(differences, z, z_base, lengths):
    """What `segment_stats` says of given latents [T, F]."""
    sums = torch.stack([part.sum(0) for part in differences.split(lengths)])
    total = LatentStats(
        differences.sum(0), differences.square().sum(0), (z > 0).sum(0), (z_base > 0).sum(0), torch.tensor(len(z))
    )
    return SegmentStats(sums, total)


def test_by_hand():
    """Two prompts, of one and of three tokens; latent 0 moves by 4 on the first, and by 1, 0, 2 on the second."""
    z_base = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    z = torch.tensor([[4.0, 1.0], [2.0, 0.0], [0.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    found = ShiftSums.of(stats_of(z - z_base, z, z_base, [1, 3]), [1, 3]).statistics()
    # m = 4, 1: mean 2.5, sd sqrt(4.5), error sqrt(4.5 / 2) = 1.5. S = 4, 3: ratio 7 / 4; residuals 9/4 and -9/4.
    assert found.shift[0] == 2.5 and found.error[0] == 1.5 and found.t[0].item() == pytest.approx(5 / 3)
    assert found.token_shift[0] == 1.75
    assert found.token_error[0].item() == pytest.approx(math.sqrt(2 * 2 * (9 / 4) ** 2) / 4)
    assert found.token_t[0].item() == pytest.approx(1.75 / (4.5 / 4))
    assert found.rate_base.tolist() == [0.25, 0.25] and found.rate_tuned.tolist() == [0.75, 0.25]
    for value in (found.shift, found.error, found.t, found.token_shift, found.token_error, found.token_t):
        assert value[1] == 0  # it did not move at all


@pytest.fixture(scope="module")
def streams():
    make = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (23,), generator=make).tolist()
    h_ref = torch.randn(sum(lengths), 24, generator=make)
    mood = torch.randn(23, 24, generator=make).repeat_interleave(torch.tensor(lengths), 0)  # tokens of a prompt agree
    h = h_ref + 0.2 * torch.randn(h_ref.shape, generator=make) + 0.3 * mood + 0.1
    weight, bias = torch.randn(50, 24, generator=make) / 5, torch.randn(50, generator=make)
    return h, h_ref, weight, bias, lengths


def brute_force(h, h_ref, weight, bias, lengths):
    z, z_base = (torch.relu(x.double() @ weight.double().T + bias.double()) for x in (h, h_ref))
    parts = (z - z_base).split(lengths)
    means = torch.stack([part.mean(0) for part in parts])  # [P, F]
    error = means.std(0) / len(means) ** 0.5
    ratio = (z - z_base).mean(0)
    residuals = torch.stack([part.sum(0) - ratio * len(part) for part in parts])
    ratio_error = (len(parts) / (len(parts) - 1) * residuals.square().sum(0)).sqrt() / sum(lengths)
    rates = ((x > 0).double().mean(0) for x in (z_base, z))
    return means.mean(0), error, means.mean(0) / error, ratio, ratio_error, ratio / ratio_error, *rates


def test_statistics_are_those_of_brute_force_in_fp64(streams):
    h, h_ref, weight, bias, lengths = streams
    sums = ShiftSums.of(segment_stats(h, weight, bias, lengths, h_ref=h_ref), lengths)
    for found, expected in zip(sums.statistics(), brute_force(*streams), strict=True):
        # z is in fp32: a hundred roundings of values below 10 in it, of sums of 24 products, on either side.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert sums.statistics().t.abs().max() > 3  # else there is nothing to see


def test_the_ratios_error_is_how_far_it_scatters_over_prompts(streams):
    """Drawing other prompts of the same kind scatters the token-weighted shift by its error, within the draw's own."""
    make = torch.Generator().manual_seed(1)
    draws, prompts = 400, 60
    lengths = torch.randint(1, 30, (draws, prompts), generator=make)
    sums = lengths * (0.5 + torch.randn(draws, prompts, generator=make)) + lengths.sqrt() * torch.randn(
        draws, prompts, generator=make
    )
    sums, tokens = sums.double(), lengths.double()
    ratio = sums.sum(1) / tokens.sum(1)
    none = torch.zeros(draws, dtype=torch.int64)
    found = ShiftSums(
        sums.sum(1), sums.square().sum(1), (sums * tokens).sum(1), (sums / tokens).sum(1),
        (sums / tokens).square().sum(1), none, none, torch.tensor(prompts), tokens.sum(1), tokens.square().sum(1),
    ).statistics()  # fmt: skip
    torch.testing.assert_close(found.token_shift, ratio)
    # 400 draws tell a standard deviation to 1 / sqrt(800) = 3.5% of itself; the estimates' bias is of order 1 / P.
    assert found.token_error.mean().item() == pytest.approx(ratio.std().item(), rel=4 * 0.035 + 1 / prompts)


def test_prompts_merge_by_addition(streams):
    h, h_ref, weight, bias, lengths = streams
    whole = ShiftSums.of(segment_stats(h, weight, bias, lengths, h_ref=h_ref), lengths)
    cut = sum(lengths[:9])
    parts = ShiftSums.zeros(50)
    for part, of_part in ((slice(cut), lengths[:9]), (slice(cut, None), lengths[9:])):
        parts += ShiftSums.of(segment_stats(h[part], weight, bias, of_part, h_ref=h_ref[part]), of_part)
    for found, expected in zip(parts.statistics(), whole.statistics(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_single_prompt_has_a_shift_and_no_error(streams):
    h, h_ref, weight, bias, lengths = streams
    n = lengths[0]
    found = ShiftSums.of(segment_stats(h[:n], weight, bias, [n], h_ref=h_ref[:n]), [n]).statistics()
    assert found.shift.isfinite().all() and found.rate_base.isfinite().all()
    for value in (found.error, found.t, found.token_error, found.token_t):
        assert value.isnan().all()
