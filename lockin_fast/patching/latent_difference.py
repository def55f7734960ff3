"""What the two sides' states differ in, at every layer and position set, as chosen SAE latents see it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lockin_fast.ops.patch_diff import patch_diff
from lockin_fast.patching.sites import Site
from lockin_fast.patching.states import Pass
from lockin_fast.sae import SparseAutoencoder


class LatentDifferences:
    """Sums over the tokens of many passes: of the difference's norm, and of the latents' changes.

    sae: the rows of the chosen latents, trained at one layer; at others they tell what the difference would mean to
    that SAE. Raises ValueError for an SAE that normalises tokens, whose latents are no function of one state alone.
    """

    def __init__(self, sae: SparseAutoencoder, layers: Sequence[int], positions: Sequence[str]):
        if sae.normalization != "none":
            raise ValueError(f"sae: it normalises every token ({sae.normalization}); give another SAE, or no latents")
        self._sae = sae
        self._keys = [(layer, name) for layer in layers for name in positions]
        self._tokens = dict.fromkeys(self._keys, 0)
        self._norm = {key: torch.zeros((), dtype=torch.float64) for key in self._keys}
        self._latents = {key: torch.zeros(len(sae.bias), dtype=torch.float64) for key in self._keys}

    def add(self, now: Pass) -> None:
        """Count the tokens of a pass: misaligned - base."""
        clean, source = now.clean["base"], now.source["misaligned"]
        sae = self._sae.to(clean.prompts.input_ids.device)
        length = clean.prompts.input_ids.shape[1]
        for layer, name in self._keys:
            site = Site("induce", "residual", layer, name)
            placed = [site.placed(row, prompt, length) for row, prompt in enumerate(now.prompts)]
            at = torch.tensor([(p.row, column) for p in placed if p for column in p.columns], dtype=torch.int64)
            parts = [("prompt", at.view(-1, 2))]
            if clean.reply and any(p and p.reply for p in placed):
                parts.append(("reply", clean.replies.real[:, 1:].nonzero()))
            for part, at in parts:
                if len(at):
                    at = at.to(clean.prompts.input_ids.device)
                    self._count((layer, name), getattr(clean, part).residual[layer], at,
                                source.take(part, "residual", layer, at, None), sae)  # fmt: skip

    def _count(self, key: tuple[int, str], h: Tensor, at: Tensor, source, sae: SparseAutoencoder) -> None:
        found = patch_diff(h, at, source, sae.weight, sae.bias, threshold=sae.threshold)
        self._tokens[key] += len(at)
        self._norm[key] += found.norm.double().sum().cpu()
        self._latents[key] += found.latents.double().sum(0).cpu()

    def rows(self, latents: Sequence[int], shown: int) -> list[dict]:
        """For every layer and position set the mean norm, and the `shown` latents that carry most of it.

        latents: the indices of the SAE's rows.
        """
        rows = []
        for layer, name in self._keys:
            tokens = max(self._tokens[layer, name], 1)
            mean = self._latents[layer, name] / tokens
            most = mean.abs().argsort(descending=True, stable=True)[:shown].tolist()
            rows.append(
                {
                    "layer": layer,
                    "positions": name,
                    "tokens": self._tokens[layer, name],
                    "norm": (self._norm[layer, name] / tokens).item(),
                    "latents": [{"latent": int(latents[k]), "change": mean[k].item()} for k in most],
                }
            )
        return rows
