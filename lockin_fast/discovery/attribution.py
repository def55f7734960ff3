"""The attribution pre-screen: what steering with each latent would do to the misalignment score, to first order.

Two passes, a forward and a backward, on each of two models stand in for a screen that generates replies for every
latent. Whether a ranking of first-order effects is that of real ones is a question to measure: `agreement` does.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lockin_fast.blocking.layers import decoder_layer, residual_stream
from lockin_fast.discovery.reply_scores import Contrast, reply_log_probs, tokenised_contrasts

BLOCK_ELEMENTS = 2**22  # of the decoder that are read at a time: 16 MB in fp32


def score_gradient(
    model: Any,
    tokenizer: Any,
    contrasts: Sequence[Contrast],
    layer: int,
    *,
    batch_size: int,
    step_done: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[float, Tensor]:
    """(score, its gradient [d]) where one vector is added to decoder layer `layer`'s output at every position.

        score    = mean over contrasts of log p(misaligned reply | prompt) - log p(aligned reply | prompt), in nats
        gradient = sum over positions of d score / d h

    so that adding epsilon u everywhere changes the score by epsilon u . gradient, up to terms in epsilon^2. The
    model's parameters get no gradient, and layers up to `layer` run without a graph: it costs a forward of all layers
    and a backward of those above, on 2 len(contrasts) rows.
    """
    if not contrasts:
        raise ValueError("contrasts: got none, expected at least one prompt with two replies")
    module = decoder_layer(model, layer)
    ids, attention, in_reply = tokenised_contrasts(tokenizer, contrasts, next(model.parameters()).device)
    weight = torch.ones(len(ids), device=ids.device) / len(contrasts)
    weight[len(contrasts) :] *= -1
    score, gradient = 0.0, 0.0
    with _frozen(model):
        for start in range(0, len(ids), batch_size):
            part = slice(start, start + batch_size)
            with torch.enable_grad(), _leaf(module) as leaf:
                logp = reply_log_probs(model, ids[part], attention[part], in_reply[part])
                of_part = (logp * weight[part].to(logp)).sum()
            (found,) = torch.autograd.grad(of_part, leaf)  # [B, S, d]
            score += of_part.item()
            gradient = gradient + found.to(torch.promote_types(found.dtype, torch.float32)).sum((0, 1))
            step_done(min(start + batch_size, len(ids)), len(ids))
    return score, gradient


@torch.no_grad()
def attributions(gradient: Tensor, directions: Tensor) -> Tensor:
    """unit(direction_k) . gradient for every row of `directions` [F, d]: nats for each unit of the residual stream."""
    rows = max(BLOCK_ELEMENTS // max(directions.shape[1], 1), 1)
    found = [
        (block.to(gradient) @ gradient) / block.to(gradient).norm(dim=1).clamp_min(torch.finfo(gradient.dtype).tiny)
        for block in directions.split(rows)
    ]
    return torch.cat(found)


def agreement(predicted: Sequence[float], measured: Sequence[float], top: int) -> dict[str, float | None]:
    """How well one ranking of the same latents foretells another, of which larger is better.

    spearman: rank correlation, ties at their mean rank; None where either is constant. overlap: share of the `top` best
    by `measured`, of those that are above 0, among as many best by `predicted`; None where none is above 0. chance: the
    overlap to expect of a random ranking.
    """
    a, b = (torch.tensor(list(values), dtype=torch.float64, device="cpu") for values in (predicted, measured))
    x, y = (_mean_ranks(values) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    size = x.norm() * y.norm()
    count = min(top, int((b > 0).sum()))
    best = [set(values.argsort(descending=True, stable=True)[:count].tolist()) for values in (a, b)]
    return {
        "spearman": (x @ y / size).item() if size > 0 else None,
        "overlap": len(best[0] & best[1]) / count if count else None,
        "chance": count / len(a) if count else None,
    }


def _mean_ranks(values: Tensor) -> Tensor:
    _, which, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count.double() - 1) / 2)[which]


@contextmanager
def _leaf(module: nn.Module) -> Iterator[list[Tensor]]:
    """`module`'s output is a leaf of the graph, of which what comes after it knows nothing; it is in the list."""
    found: list[Tensor] = []

    def cut(module, inputs, output):
        hidden = residual_stream(output).detach().requires_grad_()
        found.append(hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = module.register_forward_hook(cut)
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient, and nothing drops out."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        for module in training:
            module.training = False
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_()
        for module in training:
            module.training = True
