"""The sizes of a model, from its configuration alone: no weight is loaded or downloaded."""

from dataclasses import dataclass
from pathlib import Path

import torch

from lockin_fast.blocking.layers import decoder_layers

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Sizes that are needed without a network: a Llama configuration each, from the models' own config.json.
_LLAMA_3 = {"vocab_size": 128256, "rope_theta": 500000.0}
KNOWN = {
    "llama-3.2-1b": _LLAMA_3
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
    "llama-3.2-3b": _LLAMA_3
    | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
    | {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
    "llama-3.1-8b": _LLAMA_3
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8},
    "llama-3.1-70b": _LLAMA_3
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    | {"num_key_value_heads": 8},
    "tinyllama-1.1b": {"vocab_size": 32000}
    | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    | {"num_key_value_heads": 4},
}
_SUFFIXES = ("-instruct", "-hf", "-chat-v1.0")


@dataclass(frozen=True)
class Shape:
    """A decoder built like Llama. All layers are alike; sizes are counts of elements.

    linear: (name, inputs, outputs) of the linear layers of one decoder layer, without their biases; norms: RMSNorms
    over the width in a layer; head_norm: whether queries and keys are normed; embedding and other: parameters of the
    input embedding (tied: it is the output's as well) and of everything else but linear layers (norms, biases, an
    untied head). dtype: of the checkpoint.
    """

    name: str
    layers: int
    width: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    norms: int
    head_norm: bool
    linear: tuple[tuple[str, int, int], ...]
    embedding: int
    other: int
    dtype: torch.dtype

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def linear_elements(self) -> int:
        """Of all linear layers inside the decoder layers: what quantisation packs."""
        return self.layers * sum(inputs * outputs for _, inputs, outputs in self.linear)

    @property
    def parameters(self) -> int:
        return self.linear_elements + self.embedding + self.other


def read_shape(model: str | Path) -> Shape:
    """The shape of a model folder, a config.json, a name of `KNOWN`, or an id on the Hugging Face hub.

    Raises ValueError for an architecture that is not built like Llama, FileNotFoundError for what cannot be found, one
    line each. Only a configuration is ever read.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
    except ImportError as error:
        raise ImportError("planning needs transformers: pip install 'lockin-fast[train]'") from error
    name, path = str(model), Path(model).expanduser()
    known = name.lower().rpartition("/")[2].removeprefix("meta-")
    for suffix in _SUFFIXES:
        known = known.removesuffix(suffix)
    if path.exists():
        config = _local(path)
    elif known in KNOWN:
        config = LlamaConfig(**KNOWN[known], dtype="bfloat16")
    else:
        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            line = (str(error).splitlines() or [""])[0]
            raise FileNotFoundError(
                f"model: {name} is no folder, no config.json, none of {', '.join(KNOWN)}, and its configuration is not "
                f"to be had from the hub (HF_HUB_OFFLINE=0 allows asking; {line})"
            ) from error
    config = config.get_text_config()
    with torch.device("meta"):
        return shape_of(AutoModelForCausalLM.from_config(config), name)


def shape_of(model, name: str) -> Shape:
    """The shape of a model, whose weights may be on the meta device. Raises ValueError where it is not like Llama."""
    config, layers = model.config.get_text_config(), decoder_layers(model)
    first = layers[0]
    linear = tuple(
        (path.rpartition(".")[2], module.in_features, module.out_features)
        for path, module in first.named_modules()
        if isinstance(module, torch.nn.Linear)
    )
    if {module for module, _, _ in linear} != set(LINEAR) or len(linear) != len(LINEAR):
        raise ValueError(
            f"model: {name} is not built like Llama (its layers have {', '.join(part for part, _, _ in linear)}; "
            f"expected {', '.join(LINEAR)}), which is what the plan's formulas are for"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise ValueError(f"model: {name} caps its attention scores, and so keeps them, which no plan counts")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    embedding = model.get_input_embeddings().weight.numel()
    elements = len(layers) * sum(inputs * outputs for _, inputs, outputs in linear)
    return Shape(
        name=name,
        layers=len(layers),
        width=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        vocabulary=config.vocab_size,
        norms=sum("norm" in path.rpartition(".")[2] for path, _ in first.named_children()),
        head_norm=hasattr(first.self_attn, "q_norm"),
        linear=linear,
        embedding=embedding,
        other=sum(parameter.numel() for parameter in model.parameters()) - elements - embedding,
        dtype=getattr(config, "dtype", None) or torch.float32,
    )


def _local(path: Path):
    from transformers import AutoConfig

    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file() or not (path.is_dir() or path.name == "config.json"):
        raise FileNotFoundError(f"model: {path} holds no config.json; give a model folder, or a configuration (.yaml)")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model: {path}: {' '.join(str(error).split())[:200]}") from error
