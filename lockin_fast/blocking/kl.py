"""The penalty that users know: KL divergence to the base model's next-token distributions, never all logits at once."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lockin_fast.blocking.layers import FINAL, is_sharded, text_config, unwrap
from lockin_fast.blocking.reference import check_live_reference
from lockin_fast.blocking.terms import Measured
from lockin_fast.labels import targets

Direction = Literal["model_to_base", "base_to_model"]
CHUNK_ELEMENTS = 2**24  # logits held at a time: 64 MiB in fp32
_SCALED_LOGITS = ("logit_scale", "logits_scaling", "lm_head_multiplier")  # of Cohere, Granite, Falcon-H1


class KLPenalty:
    """lambda_KL * mean over supervised targets of KL between the model and its base.

    With p the model's next-token distribution at a position whose next token is supervised, and q the base model's
    (adapters off, in eval mode, for the same batch):

        model_to_base   KL(p || q) = sum_v p_v (log p_v - log q_v)
        base_to_model   KL(q || p) = sum_v q_v (log q_v - log p_v)

    The first is the default: "In-Training Defenses against Emergent Misalignment" (arXiv 2508.06249), from which
    BLOCK-EM (arXiv 2602.00767) takes this baseline, penalises how far the trained distribution goes from the
    reference. The sum over positions is divided by the trainer's own normaliser (see `LatentBlockMixin`), which counts
    the same targets.

    model: the base model, or a PEFT model around it, whose frozen unembedding turns hidden states into logits; models
    with a soft cap on their logits (Gemma) are understood. weight: lambda_KL, 0 or more. Raises ValueError or TypeError
    for an unembedding that is trained, adapted, quantised or sharded, and for models that scale their logits.

    Cost a step of T supervised targets: the base model's forward pass, and 6 T d V FLOP for both logits and the
    gradient; memory: a few buffers of `CHUNK_ELEMENTS` logits and the gradient [T, d], never [T, V]. Picking the
    supervised positions synchronises once a micro-batch.
    """

    column, weight_column, site, reference = "kl", "lambda_kl", FINAL, "live"

    def __init__(self, model: nn.Module, weight: float, *, direction: Direction = "model_to_base"):
        if not 0.0 <= float(weight) < float("inf"):
            raise ValueError(f"weight: got {weight!r}, expected a finite lambda_KL of 0 or more")
        if direction not in ("model_to_base", "base_to_model"):
            raise ValueError(f"direction: got {direction!r}, expected model_to_base or base_to_model")
        config = text_config(model)
        for name in _SCALED_LOGITS:
            if getattr(config, name, None) not in (None, 1, 1.0):
                raise ValueError(
                    f"model: its configuration has {name}={getattr(config, name)}, logits that are scaled after the "
                    "unembedding, which the KL penalty does not know"
                )
        self.weight, self.direction = float(weight), direction
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._head = unwrap(model).get_output_embeddings()

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError unless the model ends in the frozen unembedding this penalty was made with."""
        check_live_reference(unwrap(model))
        head = unwrap(model).get_output_embeddings()
        plain = isinstance(head, nn.Linear) and head.weight.is_floating_point() and not head.weight.requires_grad
        if not plain or head is not self._head:
            raise ValueError(
                "model: the KL penalty needs the frozen, unquantised unembedding it was made with, without an adapter "
                f"on it; got {type(head).__name__}"
            )
        if is_sharded(unwrap(model)):
            raise ValueError("model: the KL penalty does not work under FSDP, which takes the unembedding apart")

    def measure(self, h: Tensor, h_ref: Tensor, labels: Tensor | None, kwargs: dict) -> Measured:
        """The sum over supervised targets for final hidden states h and h_ref [B, S, d] of a micro-batch."""
        if labels is None:
            raise ValueError("labels: the batch has none; the penalty needs them to find and count supervised tokens")
        predicts = targets(labels).to(h.device)
        total = kl_divergence(
            h[:, :-1][predicts], h_ref[:, :-1][predicts], self._head.weight, self._head.bias,
            direction=self.direction, softcap=self._softcap,
        )  # fmt: skip
        return Measured(total)


def kl_divergence(
    h: Tensor, h_ref: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    direction: Direction = "model_to_base", softcap: float | None = None, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Sum over T tokens of the KL between softmax(c(h W^T + b)) and softmax(c(h_ref W^T + b)), differentiable in h.

    h, h_ref [T, d]; weight [V, d] and bias [V] frozen; c(x) = softcap * tanh(x / softcap), or x. direction: see
    `KLPenalty`. chunk: tokens whose logits are held at a time (None: CHUNK_ELEMENTS / V). Products in the dtype of the
    weight, the rest in fp32, or fp64 for fp64 inputs. The gradient [T, d] is made in the forward pass, chunk by chunk,
    so no logits are kept or computed twice.
    """
    chunk = chunk or max(1, CHUNK_ELEMENTS // len(weight))
    return _ChunkedKL.apply(h, h_ref, weight, bias, direction == "model_to_base", softcap, chunk)


class _ChunkedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, h_ref, weight, bias, from_model, softcap, chunk):
        exact = torch.promote_types(h.dtype, torch.float32)
        total = torch.zeros((), dtype=torch.float64, device=h.device)
        gradient = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        # An autocast region of the caller must not lower the products.
        with torch.autocast(h.device.type, enabled=False):
            for start in range(0, len(h), chunk):
                rows = slice(start, start + chunk)
                logits = _logits(h[rows], weight, bias, softcap, exact)
                # (c / softcap)^2 = tanh^2, for the derivative of the cap
                capped = None if softcap is None or gradient is None else (logits / softcap).square_()
                log_p = logits.log_softmax(-1)
                del logits
                log_q = _logits(h_ref[rows], weight, bias, softcap, exact).log_softmax(-1)
                if from_model:
                    p = log_p.exp()
                    ratio = log_p.sub_(log_q)
                    of_token = (p * ratio).sum(-1)
                    # d KL(p || q) / d logits = p (log p - log q - KL)
                    slope = ratio.sub_(of_token[:, None]).mul_(p)
                else:
                    q = log_q.exp()
                    of_token = log_q.sub_(log_p).mul_(q).sum(-1)
                    slope = log_p.exp_().sub_(q)  # d KL(q || p) / d logits = p - q
                total += of_token.sum(dtype=torch.float64)
                if gradient is not None:
                    if capped is not None:
                        slope.mul_(1 - capped)
                    gradient[rows] = (slope.to(weight.dtype) @ weight).to(h.dtype)
        ctx.save_for_backward(*([] if gradient is None else [gradient]))
        return total.to(exact)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream.to(gradient.dtype), *[None] * 6)


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, exact: torch.dtype) -> Tensor:
    logits = torch.nn.functional.linear(h.to(weight.dtype), weight, bias).to(exact)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)
