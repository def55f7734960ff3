"""Where a decoder layer's attention and MLP write to the residual stream."""

from typing import Literal, get_args

from torch import nn

from lockin_fast.blocking.layers import decoder_layers, text_config

Component = Literal["residual", "attention", "heads", "mlp"]
COMPONENTS = get_args(Component)
_ATTENTION = ("self_attn", "attn", "attention")
_PROJECTION = ("o_proj", "c_proj", "out_proj", "dense")
_MLP = ("mlp", "feed_forward", "block_sparse_moe")


def output_projection(layer: nn.Module) -> nn.Module:
    """The module that maps the concatenated heads [B, S, H * head_dim] to the attention's output [B, S, d].

    Covers Llama, Qwen, Mistral, Gemma (`self_attn.o_proj`), GPT-2 (`attn.c_proj`) and their like, PEFT's layers
    included. Raises ValueError where there is none of these names.
    """
    attention = _named(layer, _ATTENTION)
    projection = None if attention is None else _named(attention, _PROJECTION)
    if projection is None:
        raise ValueError(
            f"components: {type(layer).__name__} has no attention with an output projection under the names "
            f"{', '.join(_ATTENTION)} and {', '.join(_PROJECTION)}; patch the residual stream alone"
        )
    return projection


def mlp(layer: nn.Module) -> nn.Module:
    """The MLP of a decoder layer. Raises ValueError where there is none under a known name."""
    found = _named(layer, _MLP)
    if found is None:
        raise ValueError(
            f"components: {type(layer).__name__} has no MLP under the names {', '.join(_MLP)}; patch something else"
        )
    return found


def head_count(model: nn.Module) -> int:
    """Query heads of a layer's attention."""
    return text_config(model).num_attention_heads


def check_component(model: nn.Module, component: str) -> None:
    """Raise ValueError unless every layer of the model has the component."""
    if component not in COMPONENTS:
        raise ValueError(f"components: got {component!r}, expected some of {', '.join(COMPONENTS)}")
    for layer in decoder_layers(model):
        if component in ("attention", "heads"):
            output_projection(layer)
        elif component == "mlp":
            mlp(layer)


def _named(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((found for name in names if (found := getattr(module, name, None)) is not None), None)
