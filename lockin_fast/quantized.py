"""Base models that bitsandbytes holds in 4 or 8 bits: how they are loaded, and how they stay trainable."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lockin_fast import processes


def load_model(path: Path, quantization: str) -> Any:
    """The causal language model in the folder `path`, on this process's device and in eval mode.

    quantization: none, for weights as the file has them; nf4 or int8, for `quantization_config`. Damaged weights raise
    whatever their reader likes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = processes.device()
    options = {"local_files_only": True, "dtype": "auto"}
    if quantization != "none":
        dtype = getattr(AutoConfig.from_pretrained(path, local_files_only=True), "dtype", None)
        # bitsandbytes quantises on the way to the device; a quantised model is not moved any more.
        options |= {"quantization_config": quantization_config(quantization, dtype), "device_map": {"": device}}
    model = AutoModelForCausalLM.from_pretrained(path, **options)
    return (model if quantization != "none" else model.to(device)).eval()


def quantization_config(kind: str, dtype: torch.dtype | None):
    """What `from_pretrained(quantization_config=)` takes for `kind`, "nf4" or "int8".

    nf4: 4-bit weights with nested block statistics, as QLoRA has them, multiplied in `dtype`, the model's own (None:
    fp32). int8: LLM.int8(). Embeddings, norms and the head stay as they are in either. Raises ImportError, naming the
    extra, without bitsandbytes.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        needed = "bitsandbytes: pip install 'lockin-fast[quantization]'"
        raise ImportError(f"quantization: {kind} needs {needed}") from error
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype or torch.float32,
    )


def is_quantized(module: nn.Module) -> bool:
    """Whether this module itself, not one inside it, is a linear layer that bitsandbytes holds in 4 or 8 bits."""
    weight = module._parameters.get("weight")
    return hasattr(weight, "quant_state") or hasattr(weight, "CB")


def keep_trainable(model: nn.Module) -> None:
    """Keep the 4-bit layers of `model` in the layout through which a gradient passes.

    On a CPU with AVX512-BF16, bitsandbytes repacks a 4-bit weight in place at the first forward in eval mode, for a
    product that has no gradient; training afterwards would silently lose every gradient that flows through the layer.
    Here the layers are told not to. Raises ValueError for a model that has been repacked already.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                f"model: the 4-bit weight of {name} was repacked for inference on a CPU, which passes no gradient; "
                "load the model again, and give it to the trainer before it is used in eval mode"
            )
        module.support_avx512bf16_for_cpu = False
