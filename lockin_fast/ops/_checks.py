"""Argument checks shared by the public functions; each names the argument, what came, what was expected, what to do."""

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tensor(name, value, expected):
    """Check that `value` is a tensor, of the shape that the words `expected` tell."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor {expected}")


def floating(name, value):
    """Check that `value` is of a dtype that the kernels read."""
    if value.dtype not in DTYPES:
        raise TypeError(f"{name}: got {value.dtype}, expected float32, float16 or bfloat16; cast it first")


def hidden(name, h, width):
    """`h` [..., d] as tokens [T, d] with unit stride along d."""
    tensor(name, h, f"[..., {width}]")
    floating(name, h)
    if h.dim() == 0 or h.shape[-1] != width:
        raise ValueError(
            f"{name}: got shape {tuple(h.shape)}, expected [..., {width}] as weight is [K, {width}]; "
            "check that the SAE was trained on this model's hidden size"
        )
    tokens = h if h.dim() == 2 else h.reshape(h.shape[:-1].numel(), width)
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


def reference_shape(h_ref, h):
    """Check that a packed reference `h_ref` is of the tokens of `h`."""
    if h_ref.shape != h.shape:
        raise ValueError(
            f"h_ref: got {h_ref!r}, expected the shape {tuple(h.shape)} of h; run the reference on the same batch"
        )


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


def same_device(h, of="h", **others):
    """Check that every tensor given lies where `h` does, the argument named `of`."""
    for name, value in others.items():
        if value is not None and value.device != h.device:
            raise ValueError(f"{name}: is on {value.device}, but {of} is on {h.device}; move it there")


def token_mask(mask, leading, of="h"):
    """`mask` [...] bool over the leading dimensions of the input named `of`, as [T]; None stays None."""
    if mask is None:
        return None
    tensor("mask", mask, f"of bool [...], the leading dimensions of {of}, or None")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: got {mask.dtype}, expected bool, True for tokens that count, e.g. labels != -100")
    if mask.shape != leading:
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)}, expected {tuple(leading)}, the leading dimensions of {of}"
        )
    return mask.reshape(-1).contiguous()


def fp32(value):
    """`value` contiguous in float32; None stays None."""
    if value is None or (value.dtype is torch.float32 and value.is_contiguous()):
        return value
    return value.to(torch.float32).contiguous()


def rows_like(weight, h):
    """`weight` in h's dtype with contiguous rows."""
    return weight if weight.dtype is h.dtype and weight.is_contiguous() else weight.to(h.dtype).contiguous()


def stream(h, *dims):
    """Check hidden states that are taken as they lie, of 2 or 3 dimensions; the words `dims` tell the shapes."""
    tensor("h", h, " or ".join(dims))
    floating("h", h)
    if h.dim() not in (2, 3):
        raise ValueError(f"h: got shape {tuple(h.shape)}, expected {' or '.join(dims)}")


def writable(h):
    """Check, as torch does, that writing over `h` reaches each element once and spoils no gradient asked for."""
    if any(size > 1 and stride == 0 for size, stride in zip(h.shape, h.stride(), strict=True)):
        raise ValueError(
            f"h: got an expanded tensor, {tuple(h.shape)} of strides {h.stride()}, whose elements share memory; pass "
            "h.clone()"
        )
    if not (h.requires_grad and torch.is_grad_enabled()):
        return
    if h.is_leaf:
        raise ValueError("h: is a leaf that requires grad, which nothing may write over; pass h.clone() or use no_grad")


def known(value):
    """Whether looking at the values of `value` costs no wait: a plain tensor on the CPU, not traced."""
    return value.device.type == "cpu" and type(value) is torch.Tensor and not torch.compiler.is_compiling()


def positions(positions, h):
    """`positions` int64 [P] or [P, 2] as rows [P] of the flattened tokens of h; what is outside of h is -1.

    On the CPU a position outside of h raises instead; elsewhere that would wait for the device.
    """
    tensor("positions", positions, "of int64: [P, 2] pairs (row, position) or [P] flat tokens")
    if positions.dtype != torch.int64:
        raise TypeError(
            f"positions: got {positions.dtype}, expected int64 [P, 2] pairs (row, position) or [P] flat tokens; "
            "for a mask pass mask.nonzero()"
        )
    pairs = positions.dim() == 2 and positions.shape[1] == 2 and h.dim() == 3
    if not pairs and positions.dim() != 1:
        wanted = "[P, 2] pairs (row, position) or [P] flat tokens" if h.dim() == 3 else "[P] as h is [N, d]"
        raise ValueError(f"positions: got shape {tuple(positions.shape)}, expected {wanted}")
    same_device(h, positions=positions)
    limits = h.shape[:2] if pairs else (h.shape[:-1].numel(),)
    if known(positions) and positions.numel():
        _inside(positions if pairs else positions[:, None], limits, tuple(h.shape))
    columns = positions.unbind(1) if pairs else (positions,)
    flat = torch.add(columns[1], columns[0], alpha=limits[1]) if pairs else positions.contiguous()
    if known(positions):
        return flat
    valid = [(column >= 0) & (column < limit) for column, limit in zip(columns, limits, strict=True)]
    return torch.where(valid[0] & valid[-1], flat, -1)


def _inside(positions, limits, shape):
    for low, high, limit in zip(*(end.tolist() for end in positions.aminmax(dim=0)), limits, strict=True):
        if low < 0 or high >= limit:
            raise ValueError(
                f"positions: got {low if low < 0 else high}, expected 0 to {limit - 1} as h is {shape}; "
                "count from the start, not from the end"
            )


def source(source, count, h):
    """`source` [P, d], one row for each of `count` positions, in h's dtype."""
    tensor("source", source, f"[{count}, {h.shape[-1]}], one row per position")
    if source.shape != (count, h.shape[-1]) or not source.is_floating_point():
        raise ValueError(
            f"source: got {source.dtype} {tuple(source.shape)}, expected floating point [{count}, {h.shape[-1]}], "
            "one row of h's width per position"
        )
    same_device(h, source=source)
    return source.to(h.dtype)


def nf4_source(source, count, h):
    """The NF4Tensor `source` [P, d], one row for each of `count` positions."""
    if tuple(source.shape) != (count, h.shape[-1]):
        raise ValueError(
            f"source: got an NF4Tensor {tuple(source.shape)}, expected [{count}, {h.shape[-1]}], one row of h's width "
            "per position; pick them by source.rows(index)"
        )
    same_device(h, source=source)
    return source


def directions(name, value, h):
    """Number of rows F of `value` [F, d], of the width of h."""
    width = h.shape[-1]
    tensor(name, value, f"of rows [F, {width}]")
    if value.dim() != 2 or value.shape[1] != width or not value.is_floating_point():
        raise ValueError(
            f"{name}: got {value.dtype} {tuple(value.shape)}, expected floating point rows [F, {width}] as h is "
            f"[..., {width}]; transpose a [d, F] decoder"
        )
    return value.shape[0]


def per_row(name, value, rows):
    """Check one value for each of the `rows` of the batch."""
    tensor(name, value, f"[{rows}], one value per row of h")
    if value.shape != (rows,):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected [{rows}], one value per row of h")


def index(index, rows, count):
    """`index` int64 [R] into `count` directions, -1 for none; checked where that does not wait for the device."""
    per_row("index", index, rows)
    if index.dtype != torch.int64:
        raise TypeError(f"index: got {index.dtype}, expected int64, the direction of each row, or -1 for none")
    if known(index) and rows:
        low, high = (int(end) for end in index.aminmax())
        if low < -1 or high >= count:
            raise ValueError(f"index: got {low if low < -1 else high}, expected -1 to {count - 1}, rows of directions")
    return index.contiguous()
