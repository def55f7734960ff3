"""Other libraries as providers, each only where it is installed.

`make peers` installs them in an environment of their own, as some bring packages that do not fit torch's CPU build;
`.venv-peers/bin/python -m benchmarks.run` then shows them beside the rest. Every function returns name -> callable.
"""

import contextlib
import io
import sys

import torch


def installed(*modules):
    """Those of the named modules that import here, in the same order; absent ones are None."""
    found = []
    for name in modules:
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                found.append(__import__(name, fromlist=["_"]))
        except Exception:  # a peer that does not import here, for whatever reason, is no provider
            found.append(None)
    if nnsight := sys.modules.get("nnsight"):  # dictionary-learning brings it; it patches torch, which breaks compiling
        nnsight.DEFAULT_PATCHER.__exit__(None, None, None)
    return found


def sae_encoders(weight, bias):
    """Encode all latents: name -> (h -> z [T, F]), for relu(h W^T + b) with weight [F, d] and bias [F]."""
    lens, dictionary = installed("sae_lens", "dictionary_learning.dictionary")
    latents, width = weight.shape
    encoders = {}
    if lens:
        config = lens.StandardSAEConfig(d_in=width, d_sae=latents, dtype=_name(weight), device=str(weight.device))
        sae = _given(lens.StandardSAE(config), W_enc=weight.t().contiguous(), b_enc=bias.to(weight.dtype))
        encoders["sae-lens"] = sae.encode
    if dictionary:
        with torch.device("meta"):  # the decoder is never used
            sae = dictionary.AutoEncoder(width, latents)
        _assign(sae.encoder, weight=weight, bias=bias.to(weight.dtype))
        sae.bias = torch.nn.Parameter(weight.new_zeros(width), requires_grad=False)
        encoders["dictionary-learning"] = sae.encode
    return {name: torch.no_grad()(encode) for name, encode in encoders.items()}


def topk_encoders(weight, bias, k):
    """The k largest latents: name -> (h -> (values, indices) or a dense code), of relu(h W^T + b)."""
    fused, lens = installed("sparsify.fused_encoder", "sae_lens")
    latents, width = weight.shape
    low_bias = bias.to(weight.dtype)
    encoders = {}
    if fused:
        encoders["eai-sparsify"] = lambda h: fused.fused_encoder(h, weight, low_bias, k, "topk")[:2]
    if lens:
        config = lens.TopKSAEConfig(
            d_in=width, d_sae=latents, k=k, dtype=_name(weight), device=str(weight.device),
            rescale_acts_by_decoder_norm=False,
        )  # fmt: skip
        sae = _given(lens.TopKSAE(config), W_enc=weight.t().contiguous(), b_enc=low_bias)
        encoders["sae-lens"] = sae.encode
    return {name: torch.no_grad()(encode) for name, encode in encoders.items()}


def nf4(blocksize=64):
    """name -> (quantise: h -> state, dequantise: state -> h), without outliers."""
    (functional,) = installed("bitsandbytes.functional")
    if not functional:
        return {}

    def quantise(h):
        return functional.quantize_4bit(h, blocksize=blocksize, quant_type="nf4")

    return {"bitsandbytes": (quantise, lambda state: functional.dequantize_4bit(*state))}


def _name(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def _assign(module, **tensors):
    for name, tensor in tensors.items():
        setattr(module, name, torch.nn.Parameter(tensor, requires_grad=False))


def _given(sae, **tensors):
    _assign(sae, **tensors)
    return sae.eval()
