"""The block penalty of one latent set on one decoder layer."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lockin_fast.blocking.latents import LatentSet
from lockin_fast.blocking.layers import decoder_layer, hidden_size, unwrap
from lockin_fast.blocking.reference import check_live_reference
from lockin_fast.blocking.terms import Measured
from lockin_fast.blocking.tokens import token_mask
from lockin_fast.cache import TokenStore
from lockin_fast.cache.manifest import REMEDY, check_same
from lockin_fast.cache.noise import check_noise
from lockin_fast.cache.store import Reference as CachedReference
from lockin_fast.ops.block_penalty import Penalty, block_penalty
from lockin_fast.ops.nf4_tensor import NF4Tensor


class Rows(NamedTuple):
    """The encoder rows of the blocked latents, as the op takes them."""

    weight: Tensor  # [K, d] in the hidden state's dtype
    bias: Tensor  # [K] fp32
    sign: Tensor  # [K] fp32
    threshold: Tensor | None  # [K] fp32
    margin: Tensor | None  # [K] fp32


class BlockPenalty:
    """lambda * L_block, L_block = sum over tokens of sum_k relu(s_k (z_k - zref_k) - margin_k)^2 over a token count.

    z_k = relu(h w_k + b_k) at the output of decoder layer `layer` (0-based), zref the same on the reference model for
    the same batch, s_k = +1 for latents that may not rise and -1 for latents that may not fall. The count is the
    trainer's own normaliser (see `LatentBlockMixin`), so that `weight` means the same however a batch is split.

    sae: a SparseAutoencoder of this model and layer; only the K rows are kept, cast once for every dtype and device.
    latents: a LatentSet. weight: lambda, 0 or more; 0 measures the penalty and trains without it.
    reference: "live", the same model with its adapters off; a frozen second model; or a cache (`open_cache`), which
    costs no forward pass and is refused where its noise alone would cost a loss of 0.01 or more.
    tokens: "supervised", those whose own label is not -100 (the assistant's, as in the paper), or "all", every token
    that is not padding; the divisor stays the count of supervised tokens, which alone is exact under accumulation.
    latent_reduction: "sum" or "mean" over the K latents, a factor K in lambda.
    gate: "relu" as the paper has it, or "sae", the SAE's own threshold (JumpReLU, gated, fitted BatchTopK).
    margin: growth that costs nothing, in latent units, a number or one a latent; "noise" with a cache: four times the
    error of its latents, as measured when it was written.

    Raises ValueError or TypeError, naming the argument, before anything is computed.
    Cost a step of T tokens: 4 T K d FLOP forward (current and reference hidden state), 2 T K d backward on active
    tokens, 4 T K bytes of coefficients. Source: BLOCK-EM, arXiv 2602.00767.
    """

    column, weight_column = "block_penalty", "lambda"

    def __init__(
        self, sae, latents: LatentSet, layer: int, weight: float, *,
        reference="live", tokens="supervised", latent_reduction="sum", gate="relu", margin=None,
    ):  # fmt: skip
        _one_of("tokens", tokens, ("supervised", "all"))
        _one_of("latent_reduction", latent_reduction, ("sum", "mean"))
        _one_of("gate", gate, ("relu", "sae"))
        if not isinstance(latents, LatentSet):
            raise TypeError(f"latents: got {type(latents).__name__}, expected a LatentSet")
        if not (isinstance(reference, (nn.Module, TokenStore)) or reference == "live"):
            raise ValueError(f'reference: got {reference!r}, expected "live", a frozen second model or an opened cache')
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise ValueError(f"layer: got {layer!r}, expected the 0-based index of a decoder layer")
        if latents.layer is not None and latents.layer != layer:
            raise ValueError(f"layer: got {layer}, but the latents were chosen at layer {latents.layer}")
        if not 0.0 <= float(weight) < float("inf"):
            raise ValueError(f"weight: got {weight!r}, expected a finite lambda of 0 or more")
        self.latents, self.layer, self.weight = latents, layer, float(weight)
        self._normalizes = sae.normalization != "none"
        self.reference, self.tokens, self.latent_reduction, self.gate = reference, tokens, latent_reduction, gate
        self._master, self._normalize = _chosen_rows(sae, latents, gate, None if margin == "noise" else margin)
        self.cached: CachedReference | None = None
        if isinstance(reference, TokenStore):
            self.cached = reference.reference(sae.rows(latents.indices), threshold=self._master.threshold)
            self._fit_to_cache(reference, margin)
        elif isinstance(margin, str):
            raise ValueError(f"margin: got {margin!r}, but only a reference that is a cache has measured noise")
        self._cast: dict[tuple[torch.dtype, torch.device], Rows] = {}

    @property
    def site(self) -> int:
        """Where the hidden state is read: the blocked layer."""
        return self.layer

    def rows(self, dtype: torch.dtype, device: torch.device) -> Rows:
        """The K rows in this dtype on this device."""
        key = (dtype, torch.device(device))
        if key not in self._cast:
            weight, *rest = self._master
            self._cast[key] = Rows(weight.to(device, dtype), *(None if x is None else x.to(device) for x in rest))
        return self._cast[key]

    def __call__(
        self, h: Tensor, *, h_ref: Tensor | None = None, z_ref: Tensor | None = None, mask: Tensor | None = None
    ) -> Penalty:
        """Penalty(total, tokens, active) of hidden states h [..., d] against h_ref [..., d] or z_ref [..., K].

        mask [...] bool picks the tokens. `total` is the fp32 sum over them, without lambda, differentiable in h.
        """
        rows = self.rows(h.dtype, h.device)
        h = self._normalize(h)
        if isinstance(h_ref, NF4Tensor):
            if self._normalizes:  # a norm of the whole token, which the op that decodes does not take
                h_ref = self._normalize(h_ref.dequantize(h.dtype))
        elif h_ref is not None:
            h_ref = self._normalize(h_ref.to(h.device, h.dtype))
        # The op accumulates in fp32 by itself; an autocast region of the caller must not lower that.
        with torch.autocast(h.device.type, enabled=False):
            return block_penalty(
                h, rows.weight, rows.bias, rows.sign, z_ref=z_ref, h_ref=h_ref, mask=mask,
                threshold=rows.threshold, margin=rows.margin, latent_reduction=self.latent_reduction,
            )  # fmt: skip

    def measure(self, h: Tensor, h_ref, labels: Tensor | None, kwargs: dict) -> Measured:
        """The penalty of a trainer's micro-batch, h [B, S, d], over the tokens that `tokens` says.

        h_ref: the reference's hidden state [B, S, d], or what the cache's part of the batch holds.
        """
        against = {"h_ref": h_ref} if self.cached is None else self.cached.arguments(h_ref)
        total, tokens, active = self(h, **against, mask=token_mask(self.tokens, labels, kwargs, h))
        return Measured(total, active, tokens * len(self.latents))

    def check_shape(self, model: nn.Module) -> None:
        """Raise ValueError unless the model has the layer, and hidden states as wide as the SAE reads."""
        decoder_layer(model, self.layer)
        width = self._master.weight.shape[1]
        if hidden_size(model) != width:
            raise ValueError(f"sae: reads hidden states of width {width}, the model's are {hidden_size(model)} wide")

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError unless this penalty fits the model: layer, width, and adapters for a live reference."""
        self.check_shape(model)
        width = self._master.weight.shape[1]
        if self.reference == "live":
            check_live_reference(unwrap(model))
        elif self.cached is None:
            decoder_layer(self.reference, self.layer)
            if hidden_size(self.reference) != width:
                raise ValueError(
                    f"reference: its hidden states are {hidden_size(self.reference)} wide, the SAE reads {width}"
                )


    def _fit_to_cache(self, cache: TokenStore, margin) -> None:
        """Raise ValueError unless the cache holds what this penalty reads, with noise that lambda leaves small."""
        stored = {"layer": cache.layer, "penalised": cache.manifest["penalised"]}
        wanted = "supervised" if self.tokens == "supervised" and stored["penalised"] == "supervised" else "all"
        check_same(cache.path, stored, {"layer": self.layer, "penalised": wanted}, REMEDY)
        noise = self.cached.noise()
        if isinstance(margin, str):
            _one_of("margin", margin, ("noise",))
            self._master = self._master._replace(margin=noise.margin)
        scale = self.weight * cache.manifest["tokens_per_target"]
        check_noise(noise, scale / (len(self.latents) if self.latent_reduction == "mean" else 1), self._master.margin)


def _one_of(name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(choices)}")


def _chosen_rows(sae, latents: LatentSet, gate: str, margin) -> tuple[Rows, Callable[[Tensor], Tensor]]:
    """Rows of the SAE for the latents in its dtype, and its norm of a token. Raises for what cannot be penalised."""
    if not len(latents):
        raise ValueError("latents: got an empty set, expected at least one latent")
    largest = int(latents.indices.max())
    if largest >= sae.width:
        raise ValueError(f"latents: index {largest} is out of range; the SAE has latents 0 to {sae.width - 1}")
    if gate == "sae" and sae.activation in ("topk", "groupmax"):
        raise ValueError(
            f"gate: 'sae' with a {sae.activation} SAE needs all {sae.width} pre-activations of a token; use gate='relu'"
        )
    rows = sae.rows(latents.indices)
    threshold = rows.threshold if gate == "sae" else None
    if margin is not None:
        margin = torch.as_tensor(margin, dtype=torch.float32)
        if margin.numel() not in (1, len(latents)):
            raise ValueError(
                f"margin: got {margin.numel()} numbers, expected one, or one for each of {len(latents)} latents"
            )
        margin = margin.flatten().expand(len(latents)).contiguous()
        if not (margin.isfinite().all() and (margin >= 0).all()):
            raise ValueError(f"margin: got {margin.tolist()}, expected finite numbers of 0 or more")
    return Rows(rows.weight.detach(), rows.bias.detach(), latents.signs, threshold, margin), rows.normalize
