"""Argument checks shared by the public functions; each names the argument, what came, what was expected, what to do."""

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tensor(name, value, expected):
    """Check that `value` is a tensor, of the shape that the words `expected` tell."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor {expected}")


def hidden(name, h, width):
    """`h` [..., d] as tokens [T, d] with unit stride along d."""
    tensor(name, h, f"[..., {width}]")
    if h.dtype not in DTYPES:
        raise TypeError(f"{name}: got {h.dtype}, expected float32, float16 or bfloat16; cast it first")
    if h.dim() == 0 or h.shape[-1] != width:
        raise ValueError(
            f"{name}: got shape {tuple(h.shape)}, expected [..., {width}] as weight is [K, {width}]; "
            "check that the SAE was trained on this model's hidden size"
        )
    tokens = h if h.dim() == 2 else h.reshape(-1, width)
    return tokens if tokens.stride(-1) == 1 or width <= 1 else tokens.contiguous()


def reference(h_ref, h):
    """The reference's hidden states, of the shape and dtype of `h` [..., d], as tokens [T, d] like h's."""
    tensor("h_ref", h_ref, "of the shape and dtype of h")
    if h_ref.shape != h.shape or h_ref.dtype != h.dtype:
        raise ValueError(
            f"h_ref: got {h_ref.dtype} {tuple(h_ref.shape)}, expected {h.dtype} {tuple(h.shape)} as h; "
            "run the reference on the same batch in the same dtype"
        )
    return hidden("h_ref", h_ref, h.shape[-1])


def rows(weight, bias):
    """Number of latents K of frozen rows `weight` [K, d] and `bias` [K]."""
    tensor("weight", weight, "of rows [K, d]")
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight: got {weight.dtype} {tuple(weight.shape)}, expected floating point rows [K, d]")
    count = weight.shape[0]
    per_latent("bias", bias, count)
    return count


def frozen(weight, bias):
    """Check that nobody asks for a gradient of the SAE."""
    if (weight.requires_grad or bias.requires_grad) and torch.is_grad_enabled():
        name = "weight" if weight.requires_grad else "bias"
        raise ValueError(f"{name}: requires grad, but SAE weights are frozen here; pass {name}.detach()")


def per_latent(name, value, count, optional=False):
    """Check one value per latent, [K]; None passes where it is `optional`."""
    if value is None and optional:
        return
    tensor(name, value, f"[{count}], one value per row of weight" + (", or None" if optional else ""))
    if value.shape != (count,):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected [{count}], one value per row of weight")


def same_device(h, **others):
    """Check that every tensor given lies where `h` does."""
    for name, value in others.items():
        if value is not None and value.device != h.device:
            raise ValueError(f"{name}: is on {value.device}, but h is on {h.device}; move it there")


def token_mask(mask, leading):
    """`mask` [...] bool over the leading dimensions of h, as [T]; None stays None."""
    if mask is None:
        return None
    tensor("mask", mask, "of bool [...], the leading dimensions of h, or None")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: got {mask.dtype}, expected bool, True for tokens that count, e.g. labels != -100")
    if mask.shape != leading:
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected {tuple(leading)}, the leading dimensions of h")
    return mask.reshape(-1).contiguous()


def fp32(value):
    """`value` contiguous in float32; None stays None."""
    if value is None or (value.dtype is torch.float32 and value.is_contiguous()):
        return value
    return value.to(torch.float32).contiguous()


def rows_like(weight, h):
    """`weight` in h's dtype with contiguous rows."""
    return weight if weight.dtype is h.dtype and weight.is_contiguous() else weight.to(h.dtype).contiguous()
