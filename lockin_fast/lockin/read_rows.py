"""One forward over rows of tokens for all that looks inside it: hidden states, and what routers decide."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lockin_fast.blocking.layers import decoder_layer, residual_stream
from lockin_fast.lockin.routing import RoutingReader
from lockin_fast.patching.tokens import left_padded


@torch.no_grad()
def read_rows(
    model: Any, rows: Sequence[Sequence[int]], *, layer: int, batch_size: int, routers: RoutingReader | None = None
) -> list[Tensor]:
    """Hidden states [S, d] of every row's tokens, the output of decoder layer `layer`, on the model's device.

    rows: token ids. routers: sums up the routing of the same forwards. Rows of like length share a batch, padded on the
    left; the unembedding sees one token a row. Costs a forward of the whole model over all rows.
    """
    device = model.get_input_embeddings().weight.device
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    seen: list[Tensor] = []
    watched = decoder_layer(model, layer)
    hooks = [
        watched.register_forward_hook(lambda _, inputs, output: seen.append(residual_stream(output))),
        model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0][:, -1:], *inputs[1:])),
    ]
    try:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            tokens = left_padded([rows[i] for i in batch], device)
            with routers.reading(tokens.real) if routers else nullcontext():
                model(
                    input_ids=tokens.input_ids,
                    attention_mask=tokens.attention_mask,
                    position_ids=tokens.position_ids,
                    use_cache=False,
                )
            (hidden,) = seen
            seen.clear()
            for row, i in zip(hidden, batch, strict=True):
                found[i] = row[len(row) - len(rows[i]) :]
    finally:
        for hook in hooks:
            hook.remove()
    return found
