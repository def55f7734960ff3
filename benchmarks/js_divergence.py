"""The Jensen-Shannon divergence of a cluster of prompts over a full vocabulary, against writing its formula in torch.

No peer library has it: the JSD of training libraries is a loss between two models, and on a GPU only.
"""

import math
from functools import partial

import torch

import lockin_fast
from benchmarks.case import Case, Work

PROMPTS, VOCABULARY = 8, 128_256


def eager(logits):
    """As users write it: log-probabilities in fp32, then the entropy of the mean less the mean of the entropies."""
    log_p = logits.float().log_softmax(-1)
    p = log_p.exp()
    mean = p.mean(0)
    return (torch.special.entr(mean).sum(-1) + torch.xlogy(p, p).sum(-1).mean(0)) / math.log(2)


def by_position(logits):
    """The same, one position after the other, so that its probabilities stay in the caches."""
    return torch.stack([eager(logits[:, s]) for s in range(logits.shape[1])])


def providers(logits):
    return {
        "eager": partial(eager, logits),
        "eager by position": partial(by_position, logits),
        "js_divergence": partial(lockin_fast.js_divergence, logits),
    }


def work(positions, dtype):
    torch.manual_seed(0)
    logits = torch.randn(PROMPTS, positions, VOCABULARY).mul_(3).to(dtype)
    return Work(
        providers(logits) | {"torch.compile": partial(torch.compile(eager), logits)},
        ours=("js_divergence",),
        bytes=logits.numel() * logits.element_size(),
    )


def cases():
    for positions, dtype in ((64, torch.bfloat16), (64, torch.float32), (1, torch.bfloat16)):
        shape = {"n": PROMPTS, "S": positions, "V": VOCABULARY, "dtype": dtype}
        name = f"{positions} position{'s' * (positions > 1)}, {str(dtype)[6:]}"
        yield Case(name, shape, partial(work, positions, dtype), ("js_divergence",), rounds=5 if positions > 1 else 25)
