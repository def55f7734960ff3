"""Copying heads: does what a head writes for a token raise that token's own logit?"""

from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lockin_fast.blocking.layers import FINAL, decoder_layers, site_module
from lockin_fast.patching.heads import TWO_TOKENS, attention_calls, evaluating, run_decoder, watched_attention

FUSED_BY_HEAD = "query_key_value"  # queries, keys and values of a head side by side; others fuse them in three blocks
VALUES = ("v_proj", "qkv_proj", "c_attn", FUSED_BY_HEAD)
OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense")
NORMS = ("input_layernorm", "ln_1", "self_attn_layer_norm")
FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
VOCABULARY_BLOCK = 8192  # tokens whose embeddings are in float64 at a time
MISREAD = 0.1  # weights read in the wrong order are off by as much as the values are large


class Circuit(NamedTuple):
    """The weights of one layer's heads in float64: value [Hkv, D, d] and output [H, d, D]."""

    value: Tensor
    output: Tensor


def copying_scores(model: nn.Module, *, fold_norms: bool) -> Tensor:
    """Copying score of every head, float64 [layers, H] on the CPU, each in [-1, 1].

        score = sum_i Re(lambda_i) / sum_i |lambda_i|,  lambda the eigenvalues of W_U W_O W_V W_E

    the full OV circuit [V, V]: from the token that is attended to, to the logits that the head adds. It has the rank of
    the head, so its eigenvalues other than 0 are those of the D x D product W_V (W_E W_U) W_O, which is what is
    computed; [V, V] never is. 1: every direction is copied; near 0: no preference; below 0: the token is suppressed.
    NaN for a head that writes nothing.

    fold_norms: False takes the weights as they are. True is what TransformerLens' default processing computes: the
    gains of the norm before the attention and of the final norm are multiplied into W_V and W_U, with their centring
    where they are layer norms, and the unembedding is centred over the vocabulary, which moves no probability.
    Biases, norms on the attention's own output and what a norm divides by are left out of either.

    Projections may be quantised or carry adapters: what is read is what they do. Raises ValueError for a model whose
    value and output projections are not found, or do not do what its attention shows.

    Costs 2 V d^2 FLOPs once and 2 H D d^2 a layer in float64, memory of a few [d, d].
    Source: Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021).
    """
    circuits = ov_circuits(model)
    through = _vocabulary_product(model, centred=fold_norms)
    layers = decoder_layers(model)
    if fold_norms:
        _, final = _child(site_module(model, FINAL), FINAL_NORMS, "final norm")
        through = through @ _linear_part(final)
    found = []
    for layer, circuit in zip(layers, circuits, strict=True):
        product = through
        if fold_norms:
            product = _linear_part(_child(layer, NORMS, "norm before the attention")[1]) @ through
        value = circuit.value.repeat_interleave(len(circuit.output) // len(circuit.value), 0)
        values = torch.linalg.eigvals((value @ (product @ circuit.output)).cpu())  # [H, D]
        found.append(values.real.sum(-1) / values.abs().sum(-1))
    return torch.stack(found)


def ov_circuits(model: nn.Module) -> list[Circuit]:
    """The value and output weights of every layer's heads.

    They are checked against a forward: the values that the attention gets are what the weights make of its input, and
    what the output projection gets is what the attention gives. Raises ValueError otherwise.
    """
    projections = [
        (_child(call.module, VALUES, "value projection"), _child(call.module, OUTPUTS, "output projection")[1])
        for call in attention_calls(model)
    ]
    inputs: dict[nn.Module, Tensor] = {}
    seen = {}
    with ExitStack() as stack:
        for (_, values), outputs in projections:
            for module in (values, outputs):
                handle = module.register_forward_pre_hook(lambda module, args: inputs.update({module: args[0]}))
                stack.callback(handle.remove)
        stack.enter_context(
            watched_attention(model, lambda call, output: seen.update({call.layer: (call.value, output)}))
        )
        run_decoder(model, TWO_TOKENS)
    circuits = []
    for layer, ((name, values), outputs) in enumerate(projections):
        value, heads = seen[layer]  # [1, Hkv, 2, D], [1, 2, H, D]
        weight = _value_rows(name, weight_of(values, inputs[values]), value.shape[1], value.shape[3])
        difference = (inputs[values][0, 1] - inputs[values][0, 0]).double()  # of two tokens, so that biases cancel
        expected = (value[0, :, 1] - value[0, :, 0]).double()
        if (weight @ difference - expected).norm() > MISREAD * expected.norm():
            raise ValueError(
                f"model: the values of layer {layer} are not what the last rows of {name} make of its input, so its OV "
                "circuits cannot be read from the weights"
            )
        if not torch.equal(inputs[outputs], heads.flatten(2)):
            raise ValueError(
                f"model: layer {layer} changes the outputs of its heads before it projects them, so its OV circuits "
                "cannot be read from the weights"
            )
        output = weight_of(outputs, inputs[outputs])
        circuits.append(Circuit(weight, output.view(len(output), *heads.shape[2:]).transpose(0, 1)))
    return circuits


def weight_of(module: nn.Module, like: Tensor) -> Tensor:
    """The matrix [out, in] of a linear map, float64; of one that is quantised or carries an adapter by what it does.

    like: an input of it, for its width, dtype and device.
    """
    if type(module) is nn.Linear:
        return module.weight.detach().double()
    if type(module).__name__ == "Conv1D":  # GPT-2's linear layer, stored the other way round
        return module.weight.detach().double().T
    basis = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
    with evaluating(module):
        return (module(basis).double() - module(torch.zeros_like(basis[:1])).double()).T


def _value_rows(name: str, weight: Tensor, groups: int, width: int) -> Tensor:
    """[Hkv, D, d]: the rows of the projection of this name that make the values, head by head."""
    if name == FUSED_BY_HEAD:
        return weight.unflatten(0, (groups, 3, width))[:, 2]
    return weight[len(weight) - groups * width :].unflatten(0, (groups, width))


def _vocabulary_product(model: nn.Module, *, centred: bool) -> Tensor:
    """W_E W_U, [d, d] in float64: from an embedding's coordinates to an unembedding's, summed over the vocabulary."""
    embedding, unembedding = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embedding.shape != unembedding.shape:
        raise ValueError(
            f"model: its embedding is {tuple(embedding.shape)} and its unembedding {tuple(unembedding.shape)}; "
            "expected one row a token in both, as wide as the residual stream"
        )
    product = torch.zeros(embedding.shape[1], unembedding.shape[1], dtype=torch.float64, device=embedding.device)
    into, out = product.new_zeros(len(product)), product.new_zeros(len(product))
    for rows, others in zip(embedding.split(VOCABULARY_BLOCK), unembedding.split(VOCABULARY_BLOCK), strict=True):
        rows, others = rows.detach().double(), others.detach().double().to(product.device)
        product += rows.T @ others
        into, out = into + rows.sum(0), out + others.sum(0)
    return product - torch.outer(into, out) / len(embedding) if centred else product


def _linear_part(norm: nn.Module) -> Tensor:
    """diag(gain) times the centring of a norm, [d, d] in float64, up to a positive factor that no score notices.

    Read off what the norm does to a vector without a mean, since architectures store gains in different ways (Gemma's
    is 1 + weight); a layer norm is told by a constant that it does not notice.
    """
    weight = norm.weight
    probe = torch.ones_like(weight)
    probe[1::2] = -1
    if len(probe) % 2:
        probe[-2:] = probe.new_tensor([1, -2])
    with torch.no_grad():
        gain = (norm(probe) - norm(-probe)).double() / (2 * probe.double())  # a bias cancels
        centres = torch.allclose(norm(probe + 1), norm(probe), rtol=0.1)
    linear = torch.diag(gain)
    return linear - gain[:, None] / len(gain) if centres else linear


def _child(module: nn.Module, names: tuple[str, ...], what: str) -> tuple[str, nn.Module]:
    """Name and module of the first of `names` that `module` has."""
    for name in names:
        if isinstance(getattr(module, name, None), nn.Module):
            return name, getattr(module, name)
    raise ValueError(
        f"model: found no {what} in {type(module).__name__}: none of {', '.join(names)}; its copying scores cannot be "
        "read"
    )
