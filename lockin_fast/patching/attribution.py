"""Attribution patching: an estimate of every site's effect from two forwards and one backward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lockin_fast.patching.forward import Runner
from lockin_fast.patching.sides import Sides
from lockin_fast.patching.sites import SIDES, Direction, Site
from lockin_fast.patching.spans import covers_reply
from lockin_fast.patching.states import Clean, Pass, logprobs


def attributions(runner: Runner, sides: Sides, now: Pass, direction: Direction, wanted: Sequence[Site]) -> Tensor:
    """First-order effect of each wanted site of this direction on every contrast's logit difference: [sites, B], nats.

        sum over patched tokens of  d(log p(misaligned) - log p(aligned)) / dx . (x_source - x_target)

    with x a component's output in the target's clean run; what a patch would change if the model above were linear.
    NaN where a site has no token. Costs one forward and one backward of whole rows for all sites together, whose
    activations it holds; the clean runs are there already.
    Source: Nanda, attribution patching (2023); Syed et al., arXiv 2310.10348.
    """
    source, target = (now.clean[side] for side in SIDES[direction])
    components = tuple(dict.fromkeys(site.component for site in wanted))
    with sides.as_model(SIDES[direction][1]), torch.enable_grad():
        gradients = _gradients(runner, target, components)
    result = torch.full((len(wanted), len(now.prompts)), torch.nan)
    for number, site in enumerate(wanted):
        per_token = gradients[site.component][site.layer].float()
        change = _rows(source, site.component, site.layer) - _rows(target, site.component, site.layer)
        per_token = (per_token * change).sum(-1)  # [2 B, S], or [2 B, S, H]
        per_token = per_token if site.head is None else per_token[..., site.head]
        covered = _covered(now, site, per_token.shape[1]).to(per_token.device)
        effect = per_token.where(covered, 0.0).sum(1).view(2, -1).sum(0)  # both replies are read after the patch
        result[number] = effect.where(covered.view(2, len(now.prompts), -1).any(2).any(0), torch.nan).cpu()
    return result


def _gradients(runner: Runner, target: Clean, components: Sequence[str]) -> dict[str, dict[int, Tensor]]:
    """{component: {layer: gradient [2 B, S, ...] of the sum of all contrasts' logit differences}}."""
    replies = target.replies
    twice = torch.arange(len(target.prompts.input_ids), device=runner.device).repeat(2)
    tokens = target.prompts.rows(twice).joined(replies.without_last())
    begin = target.prompts.input_ids.shape[1]
    at = replies.real.nonzero()
    told = replies.input_ids[at[:, 0], at[:, 1]]
    at_logits = torch.stack([at[:, 0], at[:, 1] + begin - 1], 1)  # a token is predicted by the one before it
    embedding = runner.model.get_input_embeddings()
    with embedding.register_forward_hook(lambda module, args, output: output.detach().requires_grad_()):
        outcome = runner.run(tokens, watch=components, logits_at=at_logits)
    sign = torch.where(at[:, 0] < len(twice) // 2, 1.0, -1.0)
    metric = (logprobs(outcome.logits, told) * sign).sum()
    flat = [outcome.watched[component][layer] for component in components for layer in range(len(runner.layers))]
    found = iter(torch.autograd.grad(metric, flat))
    return {component: {layer: next(found) for layer in range(len(runner.layers))} for component in components}


def _rows(clean: Clean, component: str, layer: int) -> Tensor:
    """A component's output [2 B, S, ...] over prompts and replies, fp32."""
    prompt = clean.prompt.watched[component][layer].float()
    prompt = prompt.repeat(2, *(1 for _ in prompt.shape[1:]))
    return prompt if clean.reply is None else torch.cat([prompt, clean.reply.watched[component][layer].float()], 1)


def _covered(now: Pass, site: Site, columns: int) -> Tensor:
    """bool [2 B, S]: the tokens that the site patches."""
    clean = now.clean["base"]
    length = clean.prompts.input_ids.shape[1]
    covered = torch.zeros(len(clean.replies.input_ids), columns, dtype=torch.bool)
    for row, prompt in enumerate(now.prompts):
        placed = site.placed(row, prompt, length)
        if placed:
            covered[row :: len(now.prompts), list(placed.columns)] = True
    if covers_reply(site.positions):
        covered[:, length:] = clean.replies.real[:, : columns - length].cpu()
    return covered


def rank_agreement(estimates: Tensor, effects: Tensor) -> float | None:
    """Spearman's rank correlation of two series [n], pairs with a NaN left out; ties share their mean rank.

    None for fewer than three pairs, and where a series has no spread.
    """
    both = ~(estimates.isnan() | effects.isnan())
    if int(both.sum()) < 3:
        return None
    ranks = torch.stack([_ranks(estimates[both]), _ranks(effects[both])])
    value = torch.corrcoef(ranks)[0, 1].item()
    return None if value != value else value


def _ranks(values: Tensor) -> Tensor:
    values = values.double()
    below = (values[:, None] > values).sum(1)
    return below + ((values[:, None] == values).sum(1) + 1) / 2
