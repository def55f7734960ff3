"""The sparse autoencoder every reader returns: K encoder rows in one normal form."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lockin_fast.ops.encode_latents import encode_latents
from lockin_fast.sae.latents import as_latents

ACTIVATIONS = ("relu", "jumprelu", "gated", "topk", "batchtopk", "groupmax")
NORMALIZATIONS = ("none", "constant_norm_rescale", "layer_norm")
LAYER_NORM_EPSILON = 1e-5
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False, repr=False)
class SparseAutoencoder:
    """K latents of a sparse autoencoder, with everything that can be folded into the rows folded in.

        pre = N(x) weight^T + bias         [T, K]
        z   = relu(pre) * (pre > threshold)
        x'  = N^-1(z decoder + decoder_bias)

    A gated SAE has this form exactly: its gate ``u + b_gate > 0`` is ``pre > b_mag - exp(r_mag) b_gate``. Top-k keeps
    the k largest z of a token on top of it, groupmax the largest of each of k groups of F / k neighbours; both need
    every row. ``N`` is the identity, except for the two per-token norms that no weight can absorb (:meth:`normalize`).

    Fields: ``weight [K, d]`` contiguous; ``bias [K]`` fp32; ``decoder [K, d]`` and ``decoder_bias [d]`` in the
    weight's dtype; ``threshold [K]`` fp32, None for a plain relu; ``activation`` one of ``ACTIVATIONS``; ``k`` of a
    (batch) top-k or groupmax, None where the checkpoint of a top-k does not say; ``latents [K]`` int64, the original
    index of every row, None when all ``width`` rows are present; ``normalization`` one of ``NORMALIZATIONS``;
    ``metadata`` says where the SAE came from and what was folded.

    Raises ValueError on a wrong shape, dtype, device or index, and on NaN or Inf (a threshold may be infinite).
    Costs ``2 K d`` elements of memory and one pass over them for the checks.
    """

    weight: Tensor
    bias: Tensor
    decoder: Tensor
    decoder_bias: Tensor
    threshold: Tensor | None = None
    activation: str = "relu"
    k: int | None = None
    latents: Tensor | None = None
    width: int | None = None
    normalization: str = "none"
    metadata: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.width is None and self.latents is None and isinstance(self.weight, Tensor) and self.weight.dim() == 2:
            object.__setattr__(self, "width", self.weight.shape[0])
        _check_tensors(self)
        _check_activation(self)
        if self.latents is not None:
            object.__setattr__(self, "latents", as_latents(self.latents, self.width))
        object.__setattr__(self, "weight", self.weight.contiguous())

    @property
    def d_model(self) -> int:
        return self.weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def __repr__(self) -> str:
        rows = "all" if self.latents is None else f"{len(self.latents)} of"
        source = self.metadata.get("format", "made in memory")
        return (
            f"SparseAutoencoder({self.activation}, {rows} {self.width} latents, d_model={self.d_model}, "
            f"{self.dtype}, {self.device}, {source})"
        )

    def normalize(self, x: Tensor) -> Tensor:
        """What the encoder reads of ``x [..., d]``: the same shape and dtype, differentiable.

        ``none``: x. ``constant_norm_rescale``: x sqrt(d) / ||x||. ``layer_norm``: (x - mean) / (std + 1e-5) with the
        unbiased standard deviation. Both norms are computed in fp32 or better. Source: SAELens.
        """
        if self.normalization == "none":
            return x
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        offset, scale = self._token_norm(wide)
        epsilon = LAYER_NORM_EPSILON if self.normalization == "layer_norm" else 0.0
        return ((wide - offset) / (scale + epsilon)).to(x.dtype)

    def _token_norm(self, x: Tensor) -> tuple[Tensor | float, Tensor]:
        if self.normalization == "constant_norm_rescale":
            return 0.0, x.norm(dim=-1, keepdim=True) / math.sqrt(self.d_model)
        return x.mean(dim=-1, keepdim=True), x.std(dim=-1, keepdim=True)

    def encode(self, x: Tensor) -> Tensor:
        """The SAE's own code of ``x [..., d]``, gates and top-k included: fp32 ``[..., K]``.

        Ties at the k-th value of a top-k are broken as ``torch.topk`` does. Costs ``2 T K d`` FLOPs and holds
        ``[T, K]``. Raises ValueError for a top-k or groupmax SAE that was read in part or another order, and without k.
        """
        return self.encode_latents(x, gated=True)

    def encode_latents(self, x: Tensor, *, gated: bool = False) -> Tensor:
        """The dense code relu(pre) of ``x [..., d]``, before any gate: fp32 ``[..., K]``, differentiable in x.

        This is the z of BLOCK-EM (arXiv 2602.00767). ``gated=True`` applies the thresholds or the top-k as well.
        The product is taken in x's dtype and accumulated in fp32.
        """
        if not gated or self.activation not in ("topk", "groupmax"):
            threshold = self.threshold if gated else None
            return encode_latents(self.normalize(x), self.weight, self.bias, threshold=threshold)
        if self.k is None:
            raise ValueError(
                "k of the top-k is not in the checkpoint; set it with dataclasses.replace(sae, k=...), or use "
                "encode_latents(x) for the code before top-k"
            )
        if self.weight.shape[0] < self.width or self._is_reordered():
            raise ValueError(
                f"{self.activation} with k={self.k} needs all {self.width} latents in order, but "
                f"{self.weight.shape[0]} were read; load the SAE without latents=, or use encode_latents(x) for the "
                "code before it"
            )
        z = encode_latents(self.normalize(x), self.weight, self.bias)
        if self.activation == "topk":
            largest, index = z.topk(self.k, dim=-1)
            return torch.zeros_like(z).scatter(-1, index, largest)
        groups = z.unflatten(-1, (self.k, -1))
        largest, index = groups.max(dim=-1, keepdim=True)
        return torch.zeros_like(groups).scatter(-1, index, largest).flatten(-2)

    def _is_reordered(self) -> bool:
        return self.latents is not None and not torch.equal(self.latents, torch.arange(self.width))

    def decode(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """``z [..., K]`` back to the residual stream: ``[..., d]`` in the decoder's dtype.

        With some rows only, this is their share of the reconstruction, plus the decoder bias. SAEs with a per-token
        norm need the stream ``x [..., d]`` that was encoded, to undo it.
        """
        reconstruction = z.to(self.decoder.dtype) @ self.decoder + self.decoder_bias
        if self.normalization == "none":
            return reconstruction
        if x is None:
            raise ValueError(f"decode of an SAE with normalization={self.normalization!r} needs x, the encoded stream")
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        offset, scale = self._token_norm(wide)
        return (reconstruction * scale + offset).to(self.decoder.dtype)

    def rows(self, latents: Tensor | Sequence[int]) -> "SparseAutoencoder":
        """The SAE restricted to ``latents``: original indices, in the order given, copied."""
        wanted = as_latents(latents, self.width)
        position = wanted
        if self.latents is not None:
            position_of = {int(latent): row for row, latent in enumerate(self.latents)}
            missing = [int(latent) for latent in wanted if int(latent) not in position_of]
            if missing:
                raise ValueError(f"latents: {missing[0]} is not among the {len(position_of)} latents that were read")
            position = torch.tensor([position_of[int(latent)] for latent in wanted], dtype=torch.int64)
        position = position.to(self.device)
        return replace(
            self,
            weight=self.weight[position],
            bias=self.bias[position],
            decoder=self.decoder[position],
            threshold=None if self.threshold is None else self.threshold[position],
            latents=wanted,
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "SparseAutoencoder":
        """A copy on ``device`` with rows in ``dtype``; bias and threshold stay fp32.

        Raises ValueError when a weight does not fit the new dtype.
        """
        cast = {}
        for name in ("weight", "decoder", "decoder_bias"):
            cast[name] = getattr(self, name).to(device=device, dtype=dtype)
            if not is_finite(cast[name]):
                raise ValueError(f"{name} overflows {dtype}; use torch.bfloat16 or torch.float32")
        return replace(
            self,
            **cast,
            bias=self.bias.to(device=device),
            threshold=None if self.threshold is None else self.threshold.to(device=device),
        )


def _check_tensors(sae: SparseAutoencoder) -> None:
    if not isinstance(sae.weight, Tensor) or sae.weight.dim() != 2:
        raise ValueError(f"weight must be a tensor [K, d], got {_describe(sae.weight)}")
    count, d_model = sae.weight.shape
    if not isinstance(sae.width, int) or sae.width < count:
        raise ValueError(f"width must be the SAE's number of latents, at least {count}, got {sae.width!r}")
    if (count if sae.latents is None else len(sae.latents)) != (sae.width if sae.latents is None else count):
        raise ValueError(f"latents must name the {count} rows of weight out of {sae.width}, got {sae.latents!r}")
    expected = {
        "weight": ((count, d_model), DTYPES),
        "bias": ((count,), (torch.float32,)),
        "decoder": ((count, d_model), (sae.weight.dtype,)),
        "decoder_bias": ((d_model,), (sae.weight.dtype,)),
        "threshold": ((count,), (torch.float32,)),
    }
    for name, (shape, dtypes) in expected.items():
        tensor = getattr(sae, name)
        if name == "threshold" and tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be a tensor of shape {list(shape)}, got {_describe(tensor)}")
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
        if tensor.device != sae.weight.device:
            raise ValueError(f"{name} is on {tensor.device}, weight on {sae.weight.device}; use .to(device)")
        if name == "threshold":
            if tensor.isnan().any():
                raise ValueError("threshold holds NaN")
        elif not is_finite(tensor):
            raise ValueError(f"{name} holds NaN or Inf")


def _check_activation(sae: SparseAutoencoder) -> None:
    if sae.activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {sae.activation!r}")
    if sae.normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {', '.join(NORMALIZATIONS)}, got {sae.normalization!r}")
    if sae.activation in ("jumprelu", "gated") and sae.threshold is None:
        raise ValueError(f"activation={sae.activation!r} needs a threshold [K]")
    if sae.activation in ("relu", "topk", "groupmax") and sae.threshold is not None:
        raise ValueError(f"activation={sae.activation!r} has no threshold; use 'jumprelu' or 'batchtopk'")
    if sae.k is not None and not (isinstance(sae.k, int) and 1 <= sae.k <= sae.width):
        raise ValueError(f"k must be an integer from 1 to the width {sae.width}, got {sae.k!r}")
    if sae.activation == "groupmax" and (sae.k is None or sae.width % sae.k):
        raise ValueError(f"activation='groupmax' needs a k that divides the width {sae.width}, got {sae.k!r}")


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf, without a temporary of its size."""
    if tensor.numel() == 0:
        return True
    low, high = tensor.aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _describe(value) -> str:
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
