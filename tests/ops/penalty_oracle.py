"""What the kernels are held against: the formulas written out in plain torch, in fp64 as truth, in fp32 as yardstick.

Both see the operands as the kernel gets them, rounded to its dtype. As the ops promise fp32 accumulation whatever that
dtype, a kernel may err twice as much as plain fp32 torch does (rounded to the output's dtype), plus a few ulps.
"""

from dataclasses import dataclass

import torch

ULPS = 8
FEW = 16  # values; of fewer the yardstick's worst error may be small by chance, and `rounding` says what is fine


@dataclass
class Problem:
    """Inputs of the narrow ops; the per-latent vectors are fp32, as the ops take them."""

    h: torch.Tensor  # [T, d]
    weight: torch.Tensor  # [K, d]
    bias: torch.Tensor
    sign: torch.Tensor
    z_ref: torch.Tensor | None
    h_ref: torch.Tensor | None
    mask: torch.Tensor | None
    threshold: torch.Tensor | None
    margin: torch.Tensor | None
    mean: bool = False

    @property
    def op_arguments(self):
        return (
            self.h, self.weight, self.bias, self.sign, self.z_ref, self.h_ref, self.mask, self.threshold, self.margin,
            self.mean,
        )  # fmt: skip

    @property
    def options(self):
        """Keyword arguments of the public function."""
        return {
            "z_ref": self.z_ref, "h_ref": self.h_ref, "mask": self.mask, "threshold": self.threshold,
            "margin": self.margin, "latent_reduction": "mean" if self.mean else "sum",
        }  # fmt: skip

    def at(self, dtype):
        """The same numbers, every float in `dtype`."""
        values = {
            name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in vars(self).items()
        }
        return Problem(**values)


def problem(tokens, width, latents, dtype, *, ref="h", masked=False, threshold=False, margin=False, mean=False, seed=0):
    """Random inputs whose latents are on about half of the time, with differences to the reference of both signs."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=make)

    h = normal(tokens, width).to(dtype)
    return Problem(
        h=h,
        weight=(normal(latents, width) / width**0.5).to(dtype),
        bias=normal(latents) * 0.3,
        sign=torch.where(torch.rand(latents, generator=make) < 0.5, -1.0, 1.0),
        z_ref=(normal(tokens, latents).relu() if ref == "z" else None),
        h_ref=(h.float() + 0.3 * normal(tokens, width)).to(dtype) if ref == "h" else None,
        mask=torch.rand(tokens, generator=make) < 0.6 if masked else None,
        threshold=normal(latents) * 0.5 if threshold else None,
        margin=torch.rand(latents, generator=make) * 0.2 if margin else None,
        mean=mean,
    )


def encode(p, h):
    """relu(pre) * (pre > threshold), differentiable by torch's autograd."""
    pre = h @ p.weight.t() + p.bias
    return pre.relu() if p.threshold is None else pre.relu() * (pre > p.threshold)


def difference(p, h):
    """sign (z - z_ref) - margin, [T, K]; the excess is its positive part."""
    ref = p.z_ref if p.h_ref is None else encode(p, p.h_ref)
    signed = p.sign * (encode(p, h) - ref)
    return signed if p.margin is None else signed - p.margin


def per_token_penalty(p, h):
    """The formula of the penalty, [T]; masked tokens selected away."""
    excess = difference(p, h).relu()
    value = excess.square().mean(1) if p.mean and excess.shape[1] else excess.square().sum(1)
    return value if p.mask is None else torch.where(p.mask, value, 0.0)


def clear_of_steps(p, streams=None):
    """[T, K] bool: pairs whose pre-activation is not within rounding of the step where the latent switches on.

    On the others the gate may fall either way in any fp32 arithmetic, so they say nothing about a kernel.
    """
    exact = p.at(torch.float64)
    floor = 0.0 if exact.threshold is None else exact.threshold.clamp_min(0.0)
    clear = torch.ones(p.h.shape[0], p.weight.shape[0], dtype=torch.bool)
    for h in streams or [exact.h] + ([] if exact.h_ref is None else [exact.h_ref]):
        clear &= (h @ exact.weight.t() + exact.bias - floor).abs() > rounding(exact, h)
    return clear


def rounding(exact, h):
    """[T, K]: what a pre-activation may err by in fp32, sqrt(width) * eps * sum |h||w| for a sum of `width` terms."""
    size = h.abs() @ exact.weight.abs().t() + exact.bias.abs()
    return h.shape[1] ** 0.5 * torch.finfo(torch.float32).eps * size


def excess_rounding(exact):
    """([T, K], [T, K]): the excess e, and what it may err by in fp32, where no step is in doubt.

    A latent errs as its pre-activation does, the reference's too where it is encoded; the difference and the margin's
    subtraction are rounded once each. A pair that stays below zero by more than that has no excess and no error.
    """
    signed = difference(exact, exact.h)
    error = rounding(exact, exact.h)
    if exact.h_ref is not None:
        error = error + rounding(exact, exact.h_ref)
    margin = 0.0 if exact.margin is None else exact.margin.abs()
    error = error + torch.finfo(torch.float32).eps * (signed.abs() + margin)
    return signed.relu(), torch.where(signed < -error, 0.0, error)


def penalty_rounding(p):
    """([T], [T, d]): what a token's penalty, and its gradient before the upstream factor, may err by in fp32.

    Of e^2 that is 2 e de + de^2, and of the gradient's 2 e w it is 2 de |w|, on the latents that are on; sums of K
    terms add sqrt(K) * eps of their size, as `rounding` has it, and three roundings for the products in a term.
    """
    exact = p.at(torch.float64)
    e, error = excess_rounding(exact)
    share = 1.0 / e.shape[1] if exact.mean else 1.0
    own = (e.shape[1] ** 0.5 + 3.0) * torch.finfo(torch.float32).eps
    on = encode(exact, exact.h) > 0
    penalty = share * (2.0 * e * error + error.square() + own * e.square()).sum(1)
    gradient = 2.0 * share * torch.where(on, error + own * e, 0.0) @ exact.weight.abs()
    counted = torch.ones_like(penalty, dtype=torch.bool) if p.mask is None else p.mask
    return penalty * counted, gradient * counted[:, None]


def assert_as_good_as_torch(name, kernel, truth, yardstick, where=None, least=0.0):
    """|kernel - truth| <= 2 max |yardstick - truth| + a few ulps of the largest value; the worst entry is named.

    least: allowed in any case, where values are so few that the yardstick may be right by chance.
    """
    assert kernel.shape == truth.shape, f"{name}: {tuple(kernel.shape)}, expected {tuple(truth.shape)}"
    if where is None:
        where = torch.ones(truth.shape, dtype=torch.bool)
    if not where.any():
        return
    error = torch.where(where, (kernel.double() - truth).abs(), 0.0)
    allowed = 2 * torch.where(where, (yardstick.double() - truth).abs(), 0.0).max()
    eps = max(torch.finfo(kernel.dtype).eps, torch.finfo(torch.float32).eps)
    allowed = (allowed + ULPS * eps * truth[where].abs().max()).clamp(min=least)
    assert not error.isnan().any(), f"{name}: NaN where the truth has none"
    if (worst := error.max()) > allowed:
        index = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"{name}{list(index)}: got {kernel[index].item():.9g}, truth {truth[index].item():.9g}, "
            f"plain torch {yardstick[index].item():.9g}; error {worst:.3g}, allowed {allowed:.3g}"
        )
