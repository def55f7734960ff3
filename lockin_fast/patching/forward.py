"""A language model run from any of its layers upwards, with states and component outputs replaced on the way."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lockin_fast.blocking.layers import (
    decoder_layers,
    hidden_size,
    is_compiled,
    is_sharded,
    residual_stream,
    text_config,
    unwrap,
)
from lockin_fast.ops.nf4_tensor import NF4Tensor
from lockin_fast.ops.patch import patch_
from lockin_fast.patching.components import Component, check_component, head_count, mlp, output_projection
from lockin_fast.patching.tokens import Tokens

KeysValues = Mapping[int, tuple[Tensor, Tensor]]  # of a decoder layer: each [B, heads, S, head_dim]
TRIAL_ERROR = 0.05  # of the logits' norm: rounding is far below, anything left out far above


@dataclass(frozen=True)
class Edit:
    """What takes the place of a component's output at listed tokens.

    component: "residual", the decoder layer's output; "attention" and "mlp", what these put out (before the norm that
    some models have behind them); "heads", what listed heads hand to the attention's output projection.
    positions: int64 [P, 2] of (row of the batch, column of its tokens). source: [P, d], dense or an NF4Tensor; for
    heads [P, head_dim], dense. heads: int64 [P], for heads alone.
    """

    layer: int
    component: Component
    positions: Tensor
    source: Tensor | NF4Tensor
    heads: Tensor | None = None


@dataclass
class Outcome:
    """What a run showed.

    logits: [N, V] at `logits_at`. watched: {component: {layer: [B, S, d]}}, each component's output after its edits,
    "heads" as [B, S, H, head_dim]. keys_values: of the layers that ran, also of the tokens read already.
    """

    logits: Tensor | None = None
    watched: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    keys_values: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def residual(self) -> dict[int, Tensor]:
        """{layer: its output [B, S, d]}."""
        return self.watched["residual"]


class Runner:
    """The model of a patching sweep: the one place that knows how a Hugging Face model is run in part.

    The model's own forward makes masks and positions, so that padding, sliding windows and any kind of positions are
    right, and adapters and quantised layers are those of the model; layers below the first are passed over.

    Raises ValueError for a model in training mode, one that is compiled or sharded, an encoder-decoder, and one whose
    layers hand each other more than the hidden state: it is tried out on three tokens.
    """

    def __init__(self, model: nn.Module):
        if is_sharded(model) or is_compiled(model):
            raise ValueError("model: it is sharded or compiled, and cannot be run in part; load it plainly")
        self.model = unwrap(model)
        if self.model.training:
            raise ValueError("model: it is in training mode; call model.eval() first")
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise ValueError(f"model: {type(self.model).__name__} has an encoder; expected a causal language model")
        self.layers = decoder_layers(self.model)
        self.unembedding = self.model.get_output_embeddings()
        if self.unembedding is None:
            raise ValueError(f"model: {type(self.model).__name__} has no unembedding; expected a causal language model")
        self.device = self.model.get_input_embeddings().weight.device
        self._tuples = False
        self._try_out()

    def run(
        self, tokens: Tokens, *, start: int = 0, hidden: Tensor | None = None, past: KeysValues | None = None,
        edits: Sequence[Edit] = (), watch: Collection[str] = (), logits_at: Tensor | None = None,
    ) -> Outcome:  # fmt: skip
        """Run decoder layers `start` and up on `tokens`.

        start, hidden: layers below `start` are passed over, and layer `start` reads `hidden` [B, S, d], the output of
        the layer below it; a start of the number of layers leaves the final norm and the unembedding. With start 0
        nothing is passed over and `hidden` stays None.
        past: keys and values of the tokens read already, for every layer that runs; they are not changed.
        edits: at layers that run. watch: what the outcome holds: components, and "keys_values".
        logits_at: int64 [N, 2] of (row, column) whose logits are wanted.

        Gradients flow where torch has them on. Raises ValueError, before any work, for a start out of range, a missing
        or superfluous `hidden`, an edit below the start, and past or tokens that do not belong together.
        Costs the share (n - start) / n of the model's layers on B * S tokens, and N products with the unembedding.
        """
        self._check(tokens, start, hidden, past, edits)
        outcome = Outcome(watched={component: {} for component in watch if component != "keys_values"})
        cache = _filled(past, start, tokens.read) if past is not None or "keys_values" in watch else None
        with ExitStack() as stack:
            for layer in self.layers[:start]:
                _pass_over(stack, layer, (hidden,) if self._tuples else hidden)
            for edit in edits:
                register, hook = self._edit(edit)
                stack.enter_context(register(hook))
            for component, found in outcome.watched.items():
                for number in range(start, len(self.layers)):
                    register, hook = self._watch(component, number, found)
                    stack.enter_context(register(hook))
            stack.enter_context(self.unembedding.register_forward_pre_hook(_only(logits_at), with_kwargs=True))
            output = self.model(
                input_ids=tokens.input_ids,
                attention_mask=tokens.attention_mask,
                position_ids=tokens.position_ids,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        outcome.logits = None if logits_at is None else output.logits[0]
        if "keys_values" in watch:
            kept = enumerate(cache.layers[start:], start)
            outcome.keys_values = {number: (layer.keys, layer.values) for number, layer in kept}
        return outcome

    def _edit(self, edit: Edit) -> tuple[Callable, Callable]:
        """(how to hook, hook) of an edit."""
        layer, device = self.layers[edit.layer], self.device
        positions, source = edit.positions.to(device), edit.source.to(device)
        if edit.component == "heads":
            count = head_count(self.model)
            rows, columns = positions.unbind(1)
            flat = torch.stack([rows, columns * count + edit.heads.to(device)], 1)

            def replace_heads(module, args):
                heads = args[0].clone()
                patch_(heads.view(heads.shape[0], -1, heads.shape[-1] // count), flat, source)
                return (heads, *args[1:])

            return output_projection(layer).register_forward_pre_hook, replace_heads

        def replace(module, args, output):
            return _with_stream(output, patch_(residual_stream(output).clone(), positions, source))

        return _module_of(layer, edit.component).register_forward_hook, replace

    def _watch(self, component: str, number: int, found: dict[int, Tensor]) -> tuple[Callable, Callable]:
        """(how to hook, hook) that keeps the component's output of layer `number`."""
        layer = self.layers[number]
        if component == "heads":

            def see_heads(module, args):
                found[number] = args[0].unflatten(-1, (head_count(self.model), -1))
                return (found[number].flatten(-2), *args[1:])  # so that gradients reach what is kept

            return output_projection(layer).register_forward_pre_hook, see_heads

        def see(module, args, output):
            found[number] = residual_stream(output)

        return _module_of(layer, component).register_forward_hook, see

    def _check(self, tokens: Tokens, start: int, hidden: Tensor | None, past: KeysValues | None, edits) -> None:
        count, shape = len(self.layers), (*tokens.input_ids.shape, hidden_size(self.model))
        if not 0 <= start <= count:
            raise ValueError(f"start: got {start}, expected 0 to {count}: the model has {count} decoder layers")
        if (hidden is None) != (start == 0):
            raise ValueError(f"hidden: got {None if hidden is None else 'one'} for start={start}; layer 0 reads the "
                             "embeddings, every other start needs what it reads")  # fmt: skip
        if hidden is not None and hidden.shape != shape:
            raise ValueError(f"hidden: got shape {tuple(hidden.shape)}, expected {shape}, one state a token")
        if (past is not None) != (tokens.read > 0):
            raise ValueError(f"past: got {'some' if past is not None else None} for tokens that follow {tokens.read}")
        if past is not None and (missing := [number for number in range(start, count) if number not in past]):
            raise ValueError(f"past: it lacks the keys and values of layers {missing}, expected those of all that run")
        for edit in edits:
            check_component(self.model, edit.component)
            if not start <= edit.layer < count:
                raise ValueError(f"edits: got one at layer {edit.layer}, but layers {start} to {count - 1} run")
            if (edit.heads is None) == (edit.component == "heads"):
                raise ValueError(f"edits: heads are given for the component heads alone, got one of {edit.component}")

    @torch.no_grad()
    def _try_out(self) -> None:
        """Three tokens at once, from a layer in between, and in two parts: all must give the same logits."""
        name = type(self.model).__name__
        ids = torch.arange(1, 4, device=self.device)[None] % text_config(self.model).vocab_size
        whole = Tokens(ids, torch.ones_like(ids), torch.arange(3, device=self.device)[None])
        middle = (len(self.layers) + 1) // 2
        try:
            self._tuples = self._returns_tuples(whole)
            full = self.run(whole, watch=("residual", "keys_values"), logits_at=ids.new_tensor([[0, 2]]))
            below = full.residual[middle - 1]
            upper = self.run(whole, start=middle, hidden=below, logits_at=ids.new_tensor([[0, 2]]))
            read = {n: (keys[..., :2, :], values[..., :2, :]) for n, (keys, values) in full.keys_values.items()}
            last = self.run(
                whole.from_column(2), start=middle, hidden=below[:, 2:], past=read, logits_at=ids.new_tensor([[0, 0]])
            )
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"model: {name} cannot be run in part: {type(error).__name__}: {reason}") from error
        for found in (upper, last):
            if (found.logits - full.logits).float().norm() > TRIAL_ERROR * full.logits.float().norm():
                raise ValueError(
                    f"model: {name} does not give the same logits when it is run from layer {middle} on: its layers "
                    "hand each other more than the hidden state, so it cannot be patched"
                )

    def _returns_tuples(self, tokens: Tokens) -> bool:
        seen: list[Any] = []
        with self.layers[0].register_forward_hook(lambda module, args, output: seen.append(output)):
            self.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False)
        return isinstance(seen[0], tuple)


def _filled(past: KeysValues | None, start: int, read: int) -> Any:
    """A cache of full length (a sliding window is in the mask) that holds `past`; a stand-in below `start`."""
    from transformers import DynamicCache

    cache = DynamicCache()
    if past is None:
        return cache
    stand_in = torch.zeros(1, 1, read, 1, device=next(iter(past.values()))[0].device if past else None)
    for number in range(max(past, default=-1) + 1):
        keys, values = past[number] if number >= start else (stand_in, stand_in)
        cache.update(keys, values, number)
    return cache


def _pass_over(stack: ExitStack, layer: nn.Module, output: Any) -> None:
    """Until `stack` ends, `layer` computes nothing and returns `output`."""
    before = layer.__dict__.get("forward")  # of accelerate's hooks
    layer.forward = lambda *args, **kwargs: output
    if before is None:
        stack.callback(layer.__dict__.pop, "forward")
    else:
        stack.callback(setattr, layer, "forward", before)


def _module_of(layer: nn.Module, component: str) -> nn.Module:
    if component == "residual":
        return layer
    return output_projection(layer) if component == "attention" else mlp(layer)


def _with_stream(output: Any, stream: Tensor) -> Any:
    return stream if isinstance(output, Tensor) else (stream, *output[1:])


def _only(wanted: Tensor | None) -> Callable:
    """A hook that lets the unembedding see the wanted (row, column) tokens alone, as one row."""

    def pick(module, args, kwargs):
        hidden = args[0] if args else kwargs.pop("input")
        picked = hidden[:, :0] if wanted is None else hidden[wanted[:, 0], wanted[:, 1]][None]
        return (picked, *args[1:]), kwargs

    return pick
