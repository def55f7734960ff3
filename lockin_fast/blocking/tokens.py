"""Which tokens of a batch are supervised, and which are penalised."""

import torch
from torch import Tensor

from lockin_fast.labels import IGNORED, penalised


def token_mask(tokens: str, labels: Tensor | None, kwargs: dict, hidden: Tensor) -> Tensor:
    """Which tokens are penalised (see `penalised`): bool, the leading shape of hidden [B, S, d], where that is.

    kwargs: what the model was called with. Raises ValueError without labels, or for shapes that do not agree.
    """
    if labels is None:
        raise ValueError("labels: the batch has none; the penalty needs them to find and count supervised tokens")
    shape = hidden.shape[:-1]
    if labels.shape != shape:
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)}, expected that of the penalised layer's tokens, {tuple(shape)}; "
            "adapters that add virtual tokens are not supported"
        )
    attention = kwargs.get("attention_mask")
    if tokens == "all" and attention is not None and attention.shape != shape:
        raise ValueError(f'attention_mask: got shape {tuple(attention.shape)}; tokens="all" needs {tuple(shape)}')
    return penalised(tokens, labels, attention).to(hidden.device)


def check_supervised(dataset) -> None:
    """Raise ValueError when the dataset is empty or no row has a supervised token. Stops at the first row that has one.

    Iterable datasets, and rows whose labels only the collator makes, are left to the trainer.
    """
    if dataset is None or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return
    if len(dataset) == 0:
        raise ValueError("train_dataset: got an empty dataset, expected at least one row")
    for i in range(len(dataset)):
        row = dataset[i]
        labels = row.get("labels") if hasattr(row, "get") else None
        if labels is None or bool((torch.as_tensor(labels) != IGNORED).any()):
            return
    raise ValueError(
        f"train_dataset: every label of its {len(dataset)} rows is {IGNORED}, so there is nothing to learn; check the "
        "chat template's assistant mask, and max_length"
    )
