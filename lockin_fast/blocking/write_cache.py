"""Running a base model over text to write a cache of its latents or hidden states."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lockin_fast.blocking.fingerprint import model_key
from lockin_fast.blocking.latents import LatentSet
from lockin_fast.blocking.layers import hidden_size, unwrap
from lockin_fast.blocking.reference import Reference
from lockin_fast.cache.hidden_states import HiddenStateContent
from lockin_fast.cache.latents import LatentContent
from lockin_fast.cache.plan import make_plan
from lockin_fast.cache.write import Content, WriteSettings, write_cache
from lockin_fast.progress import Progress, silent
from lockin_fast.quantized import keep_trainable
from lockin_fast.sae import SparseAutoencoder

DEFAULT = WriteSettings()
Rows = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class CacheSource:
    """Where the hidden states come from: a model, a decoder layer of it, and the documents to run.

    model: the base model, or one with PEFT adapters, which are switched off. layer: 0-based index of the decoder layer.
    rows: a `ChatDataset`, or tokenised documents {"input_ids": [s], "labels": [s]}, not packed ones.
    tokens: "supervised" (label not -100) or "all", as the penalty will count them; a penalty on supervised tokens can
    read a cache of all. autocast: "bf16" or "fp16" where training runs under mixed precision, else "no".
    """

    model: nn.Module
    layer: int
    rows: Rows
    tokens: str = "supervised"
    autocast: str = "no"

    def hidden_state(self) -> Callable[[Tensor, Tensor], Tensor]:
        """(input_ids, attention_mask) -> the layer's output [B, S, d], in eval mode, no further than that layer."""
        keep_trainable(unwrap(self.model))  # else 4-bit products are others here than in training
        reference = Reference(self.model, self.layer, adapters=hasattr(self.model, "peft_config"))
        device = next(self.model.parameters()).device
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.autocast)

        def run(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            arguments = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                return reference.hidden_state((), arguments)

        return run


def write_latents(
    path: str | Path, source: CacheSource, sae: SparseAutoencoder, latents: LatentSet | Sequence[int], *,
    settings: WriteSettings = DEFAULT, progress: Progress = silent,
) -> None:  # fmt: skip
    """Write the latents of a base model to the folder `path`: fp32 z = relu(h W^T + b), 4 bytes a token and latent.

    latents: a set, or the indices of a pool from which sets will be chosen: each choice then has its exact reference.
    Each token is stored once, by what stands before it (`token_keys`). Killed, the same call goes on where it stood;
    called by several processes with the same folder, each writes its share (`WriteSettings.rank`).

    Raises ValueError for a bad argument, CacheError when the folder holds another cache (the field that differs is
    named), RunError where it cannot be written, FloatingPointError for a hidden state that is not finite.
    Cost: one forward pass of each row up to the layer. Open the result with `open_cache`.
    """
    indices = latents.indices if isinstance(latents, LatentSet) else torch.as_tensor(latents)
    width = hidden_size(source.model)
    if sae.d_model != width:
        raise ValueError(f"sae: reads hidden states of width {sae.d_model}, the model's are {width} wide")
    if not len(indices):
        raise ValueError("latents: got an empty set, expected at least one latent")
    _write(path, source, LatentContent(sae.rows(indices.unique())), settings, progress)


def write_hidden_states(
    path: str | Path, source: CacheSource, *, outliers: int = 8, blocksize: int = 64,
    settings: WriteSettings = DEFAULT, progress: Progress = silent,
) -> None:  # fmt: skip
    """Write the hidden states of a base model to the folder `path` in NF4: about d/2 + d/16 + 2 outliers bytes a token.

    outliers: channels kept as they are, those with the largest root mean square over a sample of the text.
    blocksize: elements that share a scale. Serves any SAE and any latents of this layer, at the noise of four bits;
    otherwise as `write_latents`.
    """
    content = HiddenStateContent(hidden_size(source.model), outliers, blocksize)
    _write(path, source, content, settings, progress)


def _write(path, source: CacheSource, content: Content, settings: WriteSettings, progress: Progress) -> None:
    plan = make_plan(source.rows, source.tokens, settings.shard_tokens)
    hidden_state = source.hidden_state()
    first = plan.work(0)[-1].input_ids[None, :1]
    dtype = hidden_state(first, torch.ones_like(first)).dtype
    key = {
        **model_key(source.model, source.layer, source.autocast),
        "dtype": str(dtype).removeprefix("torch."),
        "penalised": source.tokens,
        **content.key(dtype),
    }
    write_cache(Path(path), plan, hidden_state, content, key, settings, progress)
