"""The statistics of every latent's shift: sums over prompts that merge, and what follows from them."""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from lockin_fast.ops.segment_stats import SegmentStats


class ShiftStatistics(NamedTuple):
    """What stage 1 says about every latent, fp64 [F] each. Prompts are what is drawn at random, not tokens.

    With S_p the sum over the n_p tokens of prompt p of z(fine-tuned) - z(base), and P prompts:

        shift        = mean over prompts of m_p = S_p / n_p;  error = sd(m_p) / sqrt(P)
        token_shift  = sum S_p / sum n_p;                     error^2 = P / (P - 1) sum (S_p - token_shift n_p)^2
                                                                        / (sum n_p)^2
        t            = shift / error

    The token-weighted error is that of a ratio of two sums over prompts (Cochran, Sampling Techniques, 6.4): tokens of
    one prompt resemble each other, so a mean over tokens is far less certain than their number suggests. Errors are
    NaN for a single prompt; t is 0 where nothing moved. rate: share of tokens on which the latent is active.
    """

    shift: Tensor
    error: Tensor
    t: Tensor
    token_shift: Tensor
    token_error: Tensor
    token_t: Tensor
    rate_base: Tensor
    rate_tuned: Tensor


@dataclass(frozen=True)
class ShiftSums:
    """Sums over prompts, per latent; those of different prompts merge by `+`."""

    sums: Tensor  # [F] fp64, of S_p
    sum_squares: Tensor  # [F] fp64, of S_p^2
    sum_tokens: Tensor  # [F] fp64, of S_p n_p
    means: Tensor  # [F] fp64, of S_p / n_p
    mean_squares: Tensor  # [F] fp64, of (S_p / n_p)^2
    active: Tensor  # [F] int64, tokens on which the fine-tuned model's latent is active
    active_base: Tensor  # [F] int64
    prompts: Tensor  # int64 scalars: P, the sum of n_p, the sum of n_p^2
    tokens: Tensor
    token_squares: Tensor

    @classmethod
    def zeros(cls, latents: int) -> "ShiftSums":
        real = [torch.zeros(latents, dtype=torch.float64, device="cpu") for _ in range(5)]
        whole = [torch.zeros(shape, dtype=torch.int64, device="cpu") for shape in ((latents,),) * 2 + ((),) * 3]
        return cls(*real, *whole)

    @classmethod
    def of(cls, stats: SegmentStats, lengths: list[int]) -> "ShiftSums":
        """The sums over prompts of which each is a segment with these numbers of tokens; on the CPU."""
        sums = stats.sums  # [P, F]
        tokens = torch.tensor(lengths, dtype=torch.int64, device=sums.device)
        means = sums / tokens[:, None]
        per_latent = (
            sums.sum(0), sums.square().sum(0), tokens.double() @ sums, means.sum(0), means.square().sum(0),
            stats.total.count, stats.total.count_ref,
        )  # fmt: skip
        scalars = (tokens.new_tensor(len(lengths)), tokens.sum(), tokens.square().sum())
        return cls(*(value.cpu() for value in (*per_latent, *scalars)))

    def __add__(self, other: "ShiftSums") -> "ShiftSums":
        return ShiftSums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def statistics(self) -> ShiftStatistics:
        prompts, tokens = self.prompts.double(), self.tokens.double()
        freedom = torch.where(prompts > 1, prompts - 1, torch.nan)
        shift = self.means / prompts
        variance = (self.mean_squares - prompts * shift.square()).clamp_min(0.0) / freedom
        error = (variance / prompts).sqrt()
        ratio = self.sums / tokens
        residual = self.sum_squares - 2 * ratio * self.sum_tokens + ratio.square() * self.token_squares
        ratio_error = (residual.clamp_min(0.0) * prompts / freedom).sqrt() / tokens
        rates = (self.active_base / tokens, self.active / tokens)
        return ShiftStatistics(shift, error, _t(shift, error), ratio, ratio_error, _t(ratio, ratio_error), *rates)


def _t(value: Tensor, error: Tensor) -> Tensor:
    return torch.where((value == 0) & ~error.isnan(), 0.0, value / error)
