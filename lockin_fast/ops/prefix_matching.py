"""Prefix matching: how much each attention head looks at what followed earlier occurrences of the current token."""

import torch

from lockin_fast.dispatch import define
from lockin_fast.kernels.repeats import repeated
from lockin_fast.ops import _checks

SCHEMA = "(Tensor q, Tensor k, Tensor tokens, float scale) -> Tensor"

ROWS = 64  # queries whose attention the reference holds at a time


def reference(q, k, tokens, scale):
    """Plain torch: scores [B, H], some rows of the attention matrix of all heads at a time."""
    batch, heads, length, width = q.shape
    work = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(work).repeat_interleave(heads // k.shape[1], 1)
    before = tokens.roll(1, 1)  # [B, T], the token before each key
    total = q.new_zeros((batch, heads), dtype=work)
    with torch.autocast(q.device.type, enabled=False):
        for start in range(0, length, ROWS):
            rows = torch.arange(start, min(start + ROWS, length), device=q.device)
            columns = torch.arange(rows.shape[0] + start, device=q.device)
            logits = (q[:, :, start : start + ROWS].to(work) @ keys[:, :, : columns.shape[0]].mT) * scale
            attention = logits.masked_fill_(columns > rows[:, None], -torch.inf).softmax(-1)  # [B, H, rows, columns]
            # A key's token is nobody's successor at the start of the row.
            stripe = (tokens[:, rows, None] == before[:, None, columns]) & (columns > 0) & (columns <= rows[:, None])
            total += torch.where(stripe[:, None], attention, 0.0).sum((2, 3))
    return total / repeated(tokens).sum(1)[:, None]


def _fake(q, k, tokens, scale):
    return q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


define("prefix_matching", SCHEMA, reference, _fake)
_op = torch.ops.lockin_fast.prefix_matching.default


@torch.no_grad()
def prefix_matching(q, k, tokens, scale=None):
    """Prefix-matching (induction) score of every attention head, [B, H]; never [B, H, T, T].

        A[t, j] = softmax over j <= t of scale * q[t] . k[j]
        stripe  = positions j <= t just after an earlier occurrence of token t: tokens[j - 1] == tokens[t]
        score   = mean, over the positions t whose token occurred before, of the sum of A[t, j] over the stripe

    On S random tokens repeated twice this is the mean attention from t to t - (S - 1) over the second copy. A token
    with several earlier occurrences counts what followed each of them.

    Arguments
        q: queries [B, H, T, D] as they enter the attention product (after rotary embedding and the like), float32,
            float16 or bfloat16.
        k: keys [B, Hkv, T, D] of q's dtype, with H a multiple of Hkv: head h attends to key head h // (H / Hkv).
        tokens: token ids [B, T], int64.
        scale: factor of the logits; None is D ** -0.5.

    Returns scores [B, H] in float32, in [0, 1]; NaN for a row in which no token occurs twice. No gradient.

    Numerics: operands in their own dtype, products and sums accumulated in float32. NaN in a query that counts, or in
    a key it may attend to, makes the head's score NaN; keys after a query never reach it.

    Raises TypeError or ValueError, before any work, for a wrong dtype, shape or device.

    Costs D products and one exponential for every query whose token occurred before and every key up to it, at most
    B H T^2 D FLOPs; the scratch memory does not grow with H, and with T only by its token ids.

    Olsson et al., "In-context Learning and Induction Heads" (2022); the stripe over all earlier occurrences is that of
    TransformerLens' induction-head detector.
    """
    for name, value in (("q", q), ("k", k)):
        _checks.tensor(name, value, "[B, heads, T, D]")
        _checks.floating(name, value)
        if value.dim() != 4:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected [B, heads, T, D]; add the missing ones")
    (batch, heads, length, width), groups = q.shape, k.shape[1]
    if k.dtype != q.dtype or k.shape != (batch, groups, length, width) or not groups or heads % groups:
        raise ValueError(
            f"k: got {k.dtype} {tuple(k.shape)}, expected {q.dtype} [{batch}, Hkv, {length}, {width}] as q, with Hkv a "
            f"divisor of its {heads} heads"
        )
    _checks.tensor("tokens", tokens, f"[{batch}, {length}], the ids behind q")
    if tokens.dtype != torch.int64 or tokens.shape != (batch, length):
        raise ValueError(
            f"tokens: got {tokens.dtype} {tuple(tokens.shape)}, expected int64 [{batch}, {length}], the ids behind q"
        )
    _checks.same_device(q, of="q", k=k, tokens=tokens)
    q, k = (x if x.stride(-1) == 1 or width <= 1 else x.contiguous() for x in (q, k))
    return _op(q, k, tokens.contiguous(), max(width, 1) ** -0.5 if scale is None else float(scale))
