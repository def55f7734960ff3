"""From the tensors a checkpoint stores to the normal form of :class:`SparseAutoencoder`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lockin_fast.sae.container import SparseAutoencoder

# Folding is done in fp64, this many elements at a time.
BLOCK_ELEMENTS = 4 << 20


@dataclass
class StoredWeights:
    """K latents as a checkpoint stores them. The library they come from computes, for one token x [d],

        pre = latent_scale * (row_scale * ((input_scale * x - input_bias) weight^T) + bias)
        z   = relu(pre) * (pre > threshold)
        x'  = ((z / latent_scale) decoder + decoder_bias) / input_scale

    ``weight`` and ``decoder`` are ``[K, d]`` and are overwritten by :func:`to_normal_form`; ``bias``, ``row_scale``,
    ``latent_scale`` and ``threshold`` are ``[K]``, ``decoder_bias`` and ``input_bias`` are ``[d]``.
    """

    weight: Tensor
    bias: Tensor
    decoder: Tensor
    decoder_bias: Tensor
    input_bias: Tensor | None = None
    input_scale: float = 1.0
    row_scale: Tensor | None = None
    latent_scale: Tensor | None = None
    threshold: Tensor | None = None


def to_normal_form(stored: StoredWeights, **fields) -> SparseAutoencoder:
    """Fold biases and scales into the rows; ``fields`` are the remaining fields of the SAE.

    weight <- s n r W, bias <- n (b - r W a), decoder <- D / (s n), decoder_bias <- c / s, in fp64, rounded once:
    s, a, r, n are the input scale, input bias, row scale and latent scale. Raises ValueError, naming the file, when
    the result does not fit the stored dtype.
    """
    count = stored.weight.shape[0]
    row_scale = torch.ones(count, dtype=torch.float64) if stored.row_scale is None else stored.row_scale.double()
    latent_scale = (
        torch.ones(count, dtype=torch.float64) if stored.latent_scale is None else stored.latent_scale.double()
    )
    bias = stored.bias.double()
    if stored.input_bias is not None:
        bias = bias - row_scale * project(stored.weight, stored.input_bias)
    # A latent with a dead decoder row has scale 0: it never fires, and its decoder row stays 0 instead of 0/0.
    decoder_scale = torch.where(latent_scale > 0, 1 / (stored.input_scale * latent_scale), 1.0)
    scale_rows_(stored.weight, stored.input_scale * latent_scale * row_scale)
    scale_rows_(stored.decoder, decoder_scale)
    try:
        return SparseAutoencoder(
            weight=stored.weight,
            bias=(latent_scale * bias).float(),
            decoder=stored.decoder.to(stored.weight.dtype),
            decoder_bias=(stored.decoder_bias.double() / stored.input_scale).to(stored.weight.dtype),
            threshold=None if stored.threshold is None else stored.threshold.float(),
            **fields,
        )
    except ValueError as error:
        raise ValueError(f"{fields['metadata']['path']}: with biases and scales folded in, {error}") from error


def use_unit_decoder(stored: StoredWeights) -> None:
    """Measure z in units of unit decoder rows: latent_scale is the norm of the stored row."""
    stored.latent_scale = row_norms(stored.decoder)
    if stored.threshold is not None:
        stored.threshold = stored.threshold.double() * stored.latent_scale


def row_norms(rows: Tensor) -> Tensor:
    """Euclidean norm of every row: fp64 ``[K]``."""
    norms = [block.double().norm(dim=1) for block in _blocks(rows)]
    return torch.cat(norms) if norms else torch.empty(0, dtype=torch.float64)


def project(rows: Tensor, vector: Tensor) -> Tensor:
    """rows [K, d] times vector [d]: fp64 ``[K]``."""
    products = [block.double() @ vector.double() for block in _blocks(rows)]
    return torch.cat(products) if products else torch.empty(0, dtype=torch.float64)


def scale_rows_(rows: Tensor, factor: Tensor) -> None:
    """rows[k] *= factor[k] in place, rounded once to the rows' dtype."""
    if bool((factor == 1).all()):
        return
    start = 0
    for block in _blocks(rows):
        block.copy_(block.double() * factor[start : start + len(block), None])
        start += len(block)


def _blocks(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(1, BLOCK_ELEMENTS // max(1, rows.shape[1]))) if len(rows) else ()
