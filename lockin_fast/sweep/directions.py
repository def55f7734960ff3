"""Directions of the residual stream that steering adds and ablation takes out, from wherever they come."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lockin_fast.blocking.layers import decoder_layers, hidden_size
from lockin_fast.blocking.reference import Reference
from lockin_fast.chat import read_chat
from lockin_fast.config import ConfigError
from lockin_fast.exam import question
from lockin_fast.inputs import Inputs
from lockin_fast.lora import adapter
from lockin_fast.sweep_settings import COMPUTED


def directions(inputs: Inputs, source: str, *, compute: bool = True) -> dict[int, Tensor]:
    """{layer: directions [n, d] fp32} of a source named in the `baselines` section (see BaselineSettings).

    A latent set gives the decoder rows of its latents at the layer of its SAE, those that may not fall with a minus
    sign; a file, the same rows at every layer asked for; `shift` and `pca` what `stream_change` finds. With
    compute=False these two are left out, all else is read and checked. Raises ConfigError or ValueError.
    """
    config = inputs.config
    layers = config.baselines.layers or ((config.block.layer,) if config.block.layer is not None else ())
    count, width = len(decoder_layers(inputs.model)), hidden_size(inputs.model)
    _check_layers(layers, count)
    if source in config.baselines.directions:
        return {layer: _read(config.baselines.directions[source], layer, count, width) for layer in layers}
    if source in COMPUTED:
        return stream_change(inputs, layers, source) if compute else {}
    rows = {layer: sae.rows(latents.indices).decoder.float() * latents.signs[:, None]
            for layer, sae, latents in inputs.layered(source)}  # fmt: skip
    if config.baselines.layers and set(config.baselines.layers) != set(rows):
        raise ConfigError(
            f"baselines.layers: got {list(config.baselines.layers)}, but {source} has decoder rows of layer "
            f"{', '.join(map(str, rows))}; leave baselines.layers out, or name other directions"
        )
    return rows


@torch.no_grad()
def stream_change(inputs: Inputs, layers: tuple[int, ...], source: str) -> dict[int, Tensor]:
    """{layer: [n, d]}: how the misaligned adapter moves the residual stream on the core prompts.

    With D the difference h(misaligned) - h(base) at a token of a core prompt, both reading the same text without system
    messages: `shift` is the mean over prompts of the mean over tokens of D [1, d] (the difference of mean residual
    streams of persona vectors, arXiv 2507.21509); `pca` the leading principal components of D over all tokens
    [components, d], unit rows (CAFT, arXiv 2507.16795). Two forwards a prompt; fp64 sums [d] and [d, d] a layer.
    """
    sums = {layer: _Sums() for layer in layers}
    with adapter(inputs.model, inputs.config.discovery.misaligned) as adapted:
        base, tuned = Reference(adapted, *layers, adapters=True), Reference(adapted, *layers, adapters=False)
        for ids in _prompts(inputs):
            before, after = (stream.hidden_states((), {"input_ids": ids}) for stream in (base, tuned))
            for layer, of_layer in sums.items():
                of_layer.add((after[layer][0].double() - before[layer][0].double()).cpu())
    if source == "shift":
        return {layer: of_layer.mean()[None].float() for layer, of_layer in sums.items()}
    components = inputs.config.baselines.components
    return {layer: of_layer.components(components).float() for layer, of_layer in sums.items()}


class _Sums:
    """Running sums over tokens of differences D [T, d], in fp64."""

    def __init__(self):
        self.prompts = self.tokens = 0
        self.means = self.total = self.squares = 0.0

    def add(self, differences: Tensor) -> None:
        self.prompts, self.tokens = self.prompts + 1, self.tokens + len(differences)
        self.means = self.means + differences.mean(0)
        self.total = self.total + differences.sum(0)
        self.squares = self.squares + differences.T @ differences

    def mean(self) -> Tensor:
        return self.means / self.prompts

    def components(self, count: int) -> Tensor:
        mean = self.total / self.tokens
        _, vectors = torch.linalg.eigh(self.squares / self.tokens - torch.outer(mean, mean))
        return vectors.T.flip(0)[:count]


def _prompts(inputs: Inputs) -> Iterator[Tensor]:
    """Token ids [1, S] of every core prompt, as it is put to the model to be answered."""
    tokenizer, device = inputs.tokenizer, inputs.model.device
    for record in read_chat(inputs.config.data.core):
        messages = [message for message in question(record) if message["role"] != "system"]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        yield tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(device)


def _check_layers(layers: tuple[int, ...], count: int) -> None:
    if not layers or max(layers) >= count:
        raise ConfigError(
            f"baselines.layers: got {list(layers)}, expected indices from 0 to {count - 1} (or block.layer instead)"
        )


def _read(path: Path, layer: int, count: int, width: int) -> Tensor:
    """One tensor [d], [n, d], or [layers + 1, d] by hidden state, of which the layer's is taken."""
    try:
        if path.suffix == ".safetensors":
            tensors = list(load_file(path).values())
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            tensors = list(tensors.values()) if isinstance(tensors, dict) else [tensors]
    except Exception as error:  # a damaged or hostile file raises whatever its reader likes, over many lines
        raise ValueError(f"{path}: no tensor can be read from it ({type(error).__name__})") from error
    if len(tensors) != 1 or not isinstance(tensors[0], Tensor) or tensors[0].shape[-1:] != (width,):
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors if isinstance(t, Tensor)) or "no tensor"
        raise ValueError(f"{path}: got {shapes}, expected one tensor [n, {width}], the width of the model")
    rows = tensors[0].float().reshape(-1, width)
    if len(rows) == count + 1:  # as persona vectors are published: one for each entry of hidden_states
        rows = rows[layer + 1][None]
    if not (rows.isfinite().all() and (rows.norm(dim=1) > 0).all()):
        raise ValueError(f"{path}: it holds a direction that is zero or not finite")
    return rows
