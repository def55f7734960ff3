"""Do induction heads do it? Their outputs of a clean run, put into a corrupted one, against those of random heads."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lockin_fast.patching.forward import Edit, Outcome, Runner
from lockin_fast.patching.states import logprobs
from lockin_fast.patching.tokens import Tokens, left_padded


class Effect(NamedTuple):
    """Mean log-probability, in nats, of the second copy's tokens on each of N sequences, in float64 on the CPU.

    clean [N]: where the first copy is the same. corrupt [N]: where it is of other tokens. patched [sets, N]: in the
    corrupted run with a set of heads taken from the clean one.
    """

    clean: Tensor
    corrupt: Tensor
    patched: Tensor

    def recovery(self) -> Tensor:
        """(patched - corrupt) / (clean - corrupt) of every set, means over sequences: [sets]. 1: all of it is back.

        Means nothing, and may be of any size, where clean and corrupt hardly differ.
        """
        corrupt = self.corrupt.mean()
        return (self.patched.mean(1) - corrupt) / (self.clean.mean() - corrupt)


@torch.no_grad()
def patching_effect(
    runner: Runner, clean: Tensor, corrupt: Tensor, chosen: Tensor, *, start: int, batch_size: int = 8
) -> Effect:
    """Patch sets of heads from the clean run into the corrupted one, and see how well the second copy is predicted.

    clean, corrupt: token ids [N, T] that are equal from position `start` on, as `repeated_tokens` makes them; start is
    where the second copy begins. chosen: bool [sets, layers, H]. Heads are patched at positions `start` and later,
    where both runs read the same tokens: with every head and every MLP patched the corrupted run would be the clean
    one, with nothing patched it is itself.

    Costs N * (sets + 2) runs of T tokens, batch_size sets together; each runs from the first layer that it patches.
    Holds two runs of one sequence. Raises ValueError where the tokens differ from `start` on.
    """
    if clean.shape != corrupt.shape or not torch.equal(clean[:, start:], corrupt[:, start:]):
        raise ValueError(
            f"corrupt: expected {tuple(clean.shape)} token ids equal to those of clean from position {start} on"
        )
    layers = chosen.shape[1]
    first = torch.where(chosen.any(2), torch.arange(layers), layers).amin(1)  # [sets]
    order = first.argsort(stable=True)  # those that start at the same layer share a batch
    batches = order.split(batch_size) if len(chosen) else ()
    scores = clean.new_empty((2, len(clean)), dtype=torch.float64, device="cpu")
    patched = torch.empty(len(chosen), len(clean), dtype=torch.float64)
    for row, (whole, spoilt) in enumerate(zip(clean.tolist(), corrupt.tolist(), strict=True)):
        source, other = (left_padded([ids], runner.device) for ids in (whole, spoilt))
        told = _run(runner, source, start, watch=("heads",))
        plain = _run(runner, other, start, watch=("residual",))
        scores[0, row], scores[1, row] = (_score(run, source, start).item() for run in (told, plain))
        for sets in batches:
            begin = int(first[sets].min())
            count = len(sets)
            tokens = other.rows(torch.zeros(count, dtype=torch.int64, device=runner.device))
            hidden = plain.residual[begin - 1].expand(count, -1, -1) if begin else None
            edits = _edits(chosen[sets], told.watched["heads"], start)
            found = _run(runner, tokens, start, begin=begin, hidden=hidden, edits=edits)
            patched[sets, row] = _score(found, tokens, start).cpu()
    return Effect(*scores, patched)


def random_sets(size: int, draws: int, *, exclude: Tensor, seed: int) -> Tensor:
    """`draws` sets of `size` heads, each drawn without replacement from those not in `exclude`: [draws, layers, H].

    exclude: bool [layers, H], as each set is. Raises ValueError where fewer than `size` heads are left.
    """
    free = torch.nonzero(~exclude.flatten()).flatten()
    if len(free) < size:
        raise ValueError(f"size: got {size} random heads, but only {len(free)} of {exclude.numel()} are not excluded")
    generator = torch.Generator().manual_seed(seed)
    sets = torch.zeros(draws, exclude.numel(), dtype=torch.bool)
    for draw in sets:
        draw[free[torch.randperm(len(free), generator=generator)[:size]]] = True
    return sets.view(draws, *exclude.shape)


@torch.no_grad()
def second_copy_score(model: nn.Module, tokens: Tensor, *, start: int) -> Tensor:
    """Mean log-probability, in nats, of every token after position `start`, given those before it: float64 [N]."""
    tokens = tokens.to(model.get_input_embeddings().weight.device)
    logits = model(input_ids=tokens, use_cache=False).logits[:, start:-1].flatten(0, 1)
    return logprobs(logits, tokens[:, start + 1 :].flatten()).double().view(len(tokens), -1).mean(1).cpu()


def _run(runner: Runner, tokens: Tokens, start: int, *, begin: int = 0, **options) -> Outcome:
    rows, length = tokens.input_ids.shape
    at = torch.cartesian_prod(torch.arange(rows), torch.arange(start, length - 1)).to(runner.device)
    return runner.run(tokens, start=begin, logits_at=at, **options)


def _score(run: Outcome, tokens: Tokens, start: int) -> Tensor:
    """[rows]: the mean log-probability of every token after position `start`."""
    targets = tokens.input_ids[:, start + 1 :]
    return logprobs(run.logits, targets.flatten()).double().view(targets.shape).mean(1)


def _edits(chosen: Tensor, source: dict[int, Tensor], start: int) -> list[Edit]:
    """One edit a layer: the heads that each row [rows, layers, H] takes from the source's [1, T, H, D]."""
    edits = []
    for layer, states in source.items():
        rows, heads = torch.nonzero(chosen[:, layer], as_tuple=True)
        if len(rows):
            columns = torch.arange(start, states.shape[1])
            pair, column = torch.cartesian_prod(torch.arange(len(rows)), columns).unbind(1)
            taken = states[0, column, heads[pair]]
            edits.append(Edit(layer, "heads", torch.stack([rows[pair], column], 1), taken, heads[pair]))
    return edits
