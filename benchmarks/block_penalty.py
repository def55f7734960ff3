"""What the block penalty adds to a training step.

A step is reduced to its hidden state: h is an intermediate tensor, and its upstream gradient arrives in the backward.
The time without any penalty is subtracted. The reference is a hidden state read in the same pass, or cached latents.
"""

from functools import partial

import torch
from torch.nn.functional import linear

import lockin_fast
from benchmarks.case import Case, Work

TOKENS, WIDTH = 4096, 4096
OPS = ("block_penalty", "latent_backward_")


class Layers:
    """The model around h: below it nothing is computed, above it a gradient that nobody else holds is handed out."""

    def __init__(self, gradient):
        self.gradients = [gradient]

    def below(self, x):
        return _Below.apply(x, self)

    def above(self, h):
        return _Above.apply(h, self)

    def step(self, x, penalty):
        """One step with `penalty(h)` in its loss, or none, as a callable."""

        def run():
            h = self.below(x)
            loss = self.above(h)
            if penalty is not None:
                loss = loss + 1e-3 * penalty(h)
            loss.backward()

        return run


class _Below(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layers):
        ctx.layers = layers
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.layers.gradients.append(grad)
        return None, None


class _Above(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, layers):
        ctx.layers = layers
        return h.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        return ctx.layers.gradients.pop(), None


def eager(h, h_ref, z_ref, weight, bias, sign):
    """As users write it: operands in the model's dtype, the penalty in fp32."""
    z = torch.relu(linear(h, weight, bias))
    if z_ref is None:
        with torch.no_grad():
            z_ref = torch.relu(linear(h_ref, weight, bias))
    return torch.relu(sign * (z.float() - z_ref.float())).square().sum()


def upcast(h, h_ref, z_ref, weight, bias, sign):
    """As published training code does it: hidden states and encoder in fp32."""
    h_ref = None if h_ref is None else h_ref.float()
    return eager(h.float(), h_ref, z_ref, weight.float(), bias.float(), sign)


def references(h, noise, weight, cached, active):
    """(h_ref, z_ref), one of them None; about a quarter of the pairs of a share `active` of the tokens is active."""
    h_ref = h - noise
    if not cached:
        return h_ref, None
    z_ref = torch.relu(linear(h_ref, weight)).float()
    return None, torch.where(torch.rand(h.shape[0], 1) < active, z_ref, torch.full_like(z_ref, 1e4))


def work(latents, cached=False, active=1.0, tokens=TOKENS, width=WIDTH, dtype=torch.bfloat16):
    """One step without a penalty and with each way to compute it, all of the same problem."""
    torch.manual_seed(0)
    weight = torch.randn(latents, width).div_(width**0.5).to(dtype)
    bias, sign = torch.zeros(latents), torch.ones(latents)
    low_bias = bias.to(dtype)
    x = torch.randn(tokens, width).to(dtype)
    h_ref, z_ref = references(x, 0.3 * torch.randn(tokens, width).to(dtype), weight, cached, active)
    x.requires_grad_()
    layers = Layers(torch.randn(tokens, width).to(dtype))

    def by_hand(function):
        return layers.step(x, lambda h: function(h, h_ref, z_ref, weight, low_bias, sign))

    def tapped():
        h, penalty = lockin_fast.block_penalty_tap(layers.below(x), weight, bias, sign, z_ref=z_ref, h_ref=h_ref)
        (layers.above(h) + 1e-3 * penalty.total).backward()

    streams = 1 if cached else 2
    return Work(
        {
            "no penalty": layers.step(x, None),
            "eager fp32 upcast": by_hand(upcast),
            "eager": by_hand(eager),
            "torch.compile": by_hand(torch.compile(eager)),
            "block_penalty": layers.step(
                x, lambda h: lockin_fast.block_penalty(h, weight, bias, sign, z_ref=z_ref, h_ref=h_ref).total
            ),
            "block_penalty_tap": tapped,
        },
        ours=("block_penalty", "block_penalty_tap"),
        bytes=int((streams + 2 * active) * tokens * width * x.element_size()),  # the gradient is read and written
        flops=int((streams + active / 4) * 2 * tokens * width * latents),  # a quarter of the pairs has a gradient
        without="no penalty",
    )


def cases():
    for label, latents, arguments in (
        ("h_ref in the same pass", 20, {}),
        ("z_ref cached, every token active", 20, {"cached": True}),
        ("z_ref cached, 5% of tokens active", 20, {"cached": True, "active": 0.05}),
        ("h_ref in the same pass, 100 latents", 100, {}),
    ):
        shape = {"T": TOKENS, "d": WIDTH, "K": latents, "dtype": torch.bfloat16}
        yield Case(label, shape, partial(work, latents, **arguments), OPS)
