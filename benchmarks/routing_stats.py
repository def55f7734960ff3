"""routing_stats takes entropy, load and counts by class in one pass over the router's logits."""

import torch

import lockin_fast
from benchmarks.case import Case, Work


def work(tokens, experts, top_k, classes=6):
    torch.manual_seed(0)
    logits = torch.randn(tokens, experts).bfloat16()
    labels = torch.randint(0, classes, (tokens,))

    def eager():
        x = logits.float()
        p = x.softmax(1)
        entropy = -(p * x.log_softmax(1)).sum()
        cells = labels[:, None] * experts + x.topk(top_k, 1).indices
        counts = torch.zeros(classes * experts, dtype=torch.int64)
        return p.sum(0), entropy, counts.index_add_(0, cells.flatten(), torch.ones_like(cells).flatten())

    def one_softmax():
        log_p = logits.float().log_softmax(1)
        p = log_p.exp()
        cells = labels[:, None] * experts + logits.topk(top_k, 1, sorted=False).indices
        counts = torch.bincount(cells.flatten(), minlength=classes * experts)
        return p.sum(0), -torch.dot(p.flatten(), log_p.flatten()), counts

    providers = {
        "eager": eager,
        "eager, one softmax": one_softmax,
        "torch.compile": torch.compile(eager),
        "routing_stats": lambda: lockin_fast.routing_stats(logits, labels, num_classes=classes, top_k=top_k),
    }
    return Work(providers, ("routing_stats",), 2 * logits.numel() + 8 * tokens)


def cases():
    for experts, top_k in ((8, 2), (64, 8), (256, 8)):
        shape = {"T": 8192, "E": experts, "k": top_k, "dtype": torch.bfloat16}
        yield Case(f"E={experts}, top {top_k}", shape, lambda e=experts, k=top_k: work(8192, e, k), ("routing_stats",))
