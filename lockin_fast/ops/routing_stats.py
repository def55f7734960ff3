"""How a mixture-of-experts layer routes: sums over tokens that give entropy, load and mutual information."""

from dataclasses import dataclass, fields
from math import log

import torch

from lockin_fast.dispatch import define
from lockin_fast.ops import _checks

SCHEMA = (
    "(Tensor logits, Tensor? classes, Tensor? mask, int num_classes, int top_k, bool sigmoid) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
TILE_ELEMENTS = 2**18  # of the logits held at a time: 1 MB in fp32
ROUTERS = ("softmax", "sigmoid")


@dataclass(frozen=True)
class RoutingStats:
    """Sums over the tokens of one layer. Stats of different batches merge by `+` (and `sum(...)`).

    E experts, C input classes; natural logarithms, so that information is in nats.
    """

    probability: torch.Tensor  # [E] fp64, sum of the routing probabilities p
    entropy_sum: torch.Tensor  # fp64 scalar, sum of H(p)
    counts: torch.Tensor  # [E] int64, tokens that have the expert among their top k
    class_counts: torch.Tensor  # [C, E] int64, the same by class; [0, E] without classes
    tokens: torch.Tensor  # int64 scalar

    @property
    def entropy(self):
        """Mean over tokens of H(p) / ln E, in [0, 1]; 0 where there is one expert, NaN when there were no tokens."""
        return self.entropy_sum / self.tokens / (log(self.probability.shape[0]) or 1.0)

    @property
    def load(self):
        """Share of each expert in the assignments, [E] fp64, sums to 1; NaN when there were no tokens."""
        return self.counts.double() / self.counts.sum()

    @property
    def mutual_information(self):
        """Between expert and input, I(E;X) = H(mean p) - mean H(p), in nats, 0 to ln E."""
        return _entropy(self.probability / self.tokens) - self.entropy_sum / self.tokens

    @property
    def class_mutual_information(self):
        """Between expert and input class, in nats, from the counts n[c, e], with Miller's and Madow's correction.

            I(E;C) = H(E) + H(C) - H(E,C),  each H = -sum f ln f + (cells with f > 0, less 1) / 2n,  f = n[...] / n

        Independent classes give 0 on average, so that single values may be negative. A token with k experts counts k
        times. NaN without counts.
        """
        table = self.class_counts.double()
        return _miller_madow(table.sum(0)) + _miller_madow(table.sum(1)) - _miller_madow(table.flatten())

    def __add__(self, other):
        if not isinstance(other, RoutingStats):
            return NotImplemented
        if self.class_counts.shape != other.class_counts.shape:
            raise ValueError(
                f"RoutingStats: cannot merge {self._kind()} with {other._kind()}; merge stats of one layer, and pass "
                "num_classes so that every batch has the same classes"
            )
        return RoutingStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __radd__(self, other):
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def _kind(self):
        return "{1} experts by {0} classes".format(*self.class_counts.shape)


def _entropy(f):
    """-sum f ln f in nats, with 0 ln 0 = 0."""
    return torch.special.entr(f).sum()


def _miller_madow(counts):
    total = counts.sum()
    return _entropy(counts / total) + ((counts > 0).sum() - 1) / (2 * total)


def reference(logits, classes, mask, num_classes, top_k, sigmoid):
    """Plain torch over tiles of tokens, probabilities in fp32, sums in fp64.

    The lower expert wins a tie, and NaN ranks as Inf.
    """
    tokens, experts = logits.shape
    work = torch.promote_types(logits.dtype, torch.float32)
    keep = mask if mask is not None else torch.ones(tokens, dtype=torch.bool, device=logits.device)
    probability = torch.zeros(experts, dtype=torch.float64, device=logits.device)
    entropy = torch.zeros((), dtype=torch.float64, device=logits.device)
    # One row for each class, and a last one for tokens of no class.
    table = torch.zeros((num_classes + 1, experts), dtype=torch.int64, device=logits.device)
    rows = max(TILE_ELEMENTS // max(experts, 1), 1)
    for start in range(0, tokens, rows):
        part = slice(start, start + rows)
        x, kept = logits[part].to(work), keep[part, None]
        rank = x.masked_fill(x.isnan(), torch.inf)
        chosen = torch.sort(rank, dim=1, descending=True, stable=True).indices[:, :top_k]
        # sigmoid(x) / sum sigmoid(x) is the softmax of log sigmoid(x)
        log_p = torch.log_softmax(torch.nn.functional.logsigmoid(x) if sigmoid else x, 1)
        p = log_p.exp()
        probability += torch.where(kept, p, 0.0).sum(0, dtype=torch.float64)
        entropy -= torch.where(kept & (p != 0), p * log_p, 0.0).sum(dtype=torch.float64)
        label = torch.full_like(keep[part], num_classes, dtype=torch.int64)
        if classes is not None:
            given = classes[part]
            label = torch.where((given >= 0) & (given < num_classes), given, num_classes)
        cells = label[:, None] * experts + chosen
        table.view(-1).index_add_(0, cells.flatten(), kept.long().expand_as(cells).flatten())
    return probability, entropy, table.sum(0), table[:num_classes].clone(), keep.sum()


def _fake(logits, classes, mask, num_classes, top_k, sigmoid):
    experts = logits.shape[1]
    wide, whole = (lambda *shape: logits.new_empty(shape, dtype=torch.float64)), torch.int64
    table = logits.new_empty((num_classes, experts), dtype=whole)
    return wide(experts), wide(), logits.new_empty((experts,), dtype=whole), table, logits.new_empty((), dtype=whole)


define("routing_stats", SCHEMA, reference, _fake)
_op = torch.ops.lockin_fast.routing_stats.default


@torch.no_grad()
def routing_stats(router_logits, classes=None, *, num_classes=None, mask=None, top_k=1, router="softmax"):
    """Sums over tokens from which routing entropy, load and mutual information follow; one layer a call.

        p          = softmax(logits), or sigmoid(logits) / sum sigmoid(logits), over all E experts
        entropy    = mean H(p) / ln E;              load[e] = share of e in the top-k assignments
        I(E;X)     = H(mean p) - mean H(p);         I(E;C) from counts [C, E], with Miller's and Madow's correction

    Arguments
        router_logits: [..., E], raw, float32, float16 or bfloat16.
        classes: int64 [...], the class of each token's input, 0 to C - 1; -1 for none.
        num_classes: C. By default 1 + the largest class, which on a GPU waits for the device.
        mask: bool [...], True for tokens that count. None counts all.
        top_k: experts a token is sent to, those with the largest logits; the lower expert wins a tie.
        router: "softmax" or "sigmoid".

    Returns `RoutingStats`, which merges across batches by `+` and gives `.entropy`, `.load`, `.mutual_information`
    and `.class_mutual_information`. Sums are float64 and int64, probabilities float32. No gradient. NaN in a counted
    token reaches the sums; in a masked token it does not.

    Raises TypeError or ValueError, before any work, for a wrong dtype, shape, device or option, and on the CPU for a
    class beyond C; on other devices such a token is of no class.

    Costs one read of the logits; the scratch memory is a tile's.

    Routing entropy and expert-input mutual information as in arXiv 2510.20190; the bias correction is Miller's (1955).
    """
    if router not in ROUTERS:
        raise ValueError(f"router: got {router!r}, expected one of {', '.join(ROUTERS)}")
    _checks.tensor("router_logits", router_logits, "[..., E]")
    _checks.floating("router_logits", router_logits)
    if router_logits.dim() == 0 or router_logits.shape[-1] == 0:
        raise ValueError(f"router_logits: got shape {tuple(router_logits.shape)}, expected [..., E] with E experts")
    logits, leading = router_logits.reshape(-1, router_logits.shape[-1]), router_logits.shape[:-1]
    if not isinstance(top_k, int) or not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k: got {top_k!r}, expected 1 to {logits.shape[1]}, the number of experts")
    mask = _checks.token_mask(mask, leading, of="router_logits")
    classes, num_classes = _classes(classes, num_classes, leading)
    _checks.same_device(router_logits, of="router_logits", classes=classes, mask=mask)
    return RoutingStats(*_op(logits, classes, mask, num_classes, top_k, router == "sigmoid"))


def _classes(classes, count, leading):
    """Classes [T] of the tokens and their number."""
    if classes is None:
        if count is not None:
            raise ValueError(f"num_classes: got {count!r} without classes, expected None; pass the classes too")
        return None, 0
    _checks.tensor("classes", classes, "of int64 [...], the leading dimensions of router_logits, or None")
    if classes.dtype != torch.int64:
        raise TypeError(f"classes: got {classes.dtype}, expected int64, the class of each token, or -1 for none")
    if classes.shape != leading:
        raise ValueError(
            f"classes: got shape {tuple(classes.shape)}, expected {tuple(leading)}, the leading dimensions of "
            "router_logits"
        )
    classes = classes.reshape(-1).contiguous()
    if count is None:
        count = int(classes.max()) + 1 if classes.numel() else 0
    if not isinstance(count, int) or count < 0:
        raise ValueError(f"num_classes: got {count!r}, expected the number of classes, or None")
    if _checks.known(classes) and classes.numel():
        low, high = (int(end) for end in classes.aminmax())
        if low < -1 or high >= count:
            got = low if low < -1 else high
            raise ValueError(f"classes: got {got}, expected -1 to {count - 1} as there are {count} classes")
    return classes, count
