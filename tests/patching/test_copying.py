"""Copying scores against the eigenvalues of the explicit [V, V] circuits of a tiny vocabulary."""

import pytest
import torch
from attention_models import INDUCTION_HEAD, build, induction_model
from torch import nn

from lockin_fast.patching.copying import copying_scores, ov_circuits, weight_of
from lockin_fast.patching.heads import run_decoder, watched_attention
from lockin_fast.quantized import keep_trainable

KINDS = ["llama", "qwen2", "phi3", "gemma", "gpt_neox", "gpt2"]


def by_hand(model, kind, *, fold):
    """Scores [layers, H] from explicit [V, V] circuits, written out for each architecture's own layout."""
    model = model.double()
    width, heads = model.config.hidden_size, model.config.num_attention_heads
    embedding, unembedding = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    base = model.base_model
    layers = base.h if kind == "gpt2" else base.layers
    final = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}.get(kind, "norm")
    found = []
    for layer in layers:
        attention = {"gpt2": "attn", "gpt_neox": "attention"}.get(kind, "self_attn")
        attention = getattr(layer, attention)
        if kind == "gpt2":
            value, out = attention.c_attn.weight.T[2 * width :], attention.c_proj.weight.T
        elif kind == "gpt_neox":
            value = attention.query_key_value.weight.view(heads, 3, -1, width)[:, 2].reshape(width, width)
            out = attention.dense.weight
        elif kind == "phi3":
            value, out = attention.qkv_proj.weight[-16:], attention.o_proj.weight
        else:
            value, out = attention.v_proj.weight, attention.o_proj.weight
        size = out.shape[1] // heads
        before = getattr(layer, "ln_1" if kind == "gpt2" else "input_layernorm")
        scores = []
        for head in range(heads):
            group = head // (heads * size // len(value))
            value_h, out_h = value[group * size :][:size], out[:, head * size :][:, :size]
            into, onto = embedding.T, unembedding
            if fold:
                into, onto = _folded(before, kind) @ into, onto @ _folded(getattr(base, final), kind)
                onto = onto - onto.mean(0)
            eigenvalues = torch.linalg.eigvals(onto @ out_h @ value_h @ into)  # [V]
            scores.append(eigenvalues.real.sum() / eigenvalues.abs().sum())
        found.append(torch.stack(scores))
    return torch.stack(found)


def _folded(norm, kind):
    gain = norm.weight + (kind == "gemma")
    centring = torch.eye(len(gain)).double()
    if isinstance(norm, nn.LayerNorm):
        centring -= 1 / len(gain)
    return gain[:, None] * centring


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_equals_the_eigenvalues_of_the_whole_circuit(kind, fold):
    scores = copying_scores(build(kind), fold_norms=fold)
    expected = by_hand(build(kind), kind, fold=fold)
    assert scores.shape == (2, 4) and scores.abs().max() <= 1
    assert expected.std() > 0.02
    # The other V - D eigenvalues are 0 but for rounding, which the root of a defective zero makes large.
    assert (scores - expected).abs().max() < 1e-5


def test_norms_matter():
    plain, folded = (copying_scores(build("llama"), fold_norms=fold) for fold in (False, True))
    assert (plain - folded).abs().max() > 0.05


def test_a_head_that_copies_scores_one_and_one_that_writes_nothing_nan():
    scores = copying_scores(induction_model(), fold_norms=False)
    assert scores[INDUCTION_HEAD] == 1
    assert scores[0, 1].isnan() and scores[1, 1].isnan()
    model = induction_model()
    with torch.no_grad():
        model.transformer.h[1].attn.c_proj.weight.neg_()
    assert copying_scores(model, fold_norms=False)[INDUCTION_HEAD] == -1


def _keep_first(seen, output):
    seen.setdefault("heads", output[0, 0])


@torch.no_grad()
def test_circuits_are_what_heads_write():
    """One token sees itself alone, so what a head adds is its OV circuit applied to the normed embedding."""
    for kind in ("llama", "gpt_neox", "gpt2", "phi3"):
        model = build(kind).double()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
        norms = {"gpt2": "transformer.h.0.ln_1", "gpt_neox": "gpt_neox.layers.0.input_layernorm"}
        norm = model.get_submodule(norms.get(kind, "model.layers.0.input_layernorm"))
        circuit, seen = ov_circuits(model)[0], {}
        norm.register_forward_hook(lambda module, inputs, output, seen=seen: seen.update(x=output[0, 0]))
        with watched_attention(model, lambda call, output, seen=seen: _keep_first(seen, output)):
            run_decoder(model, torch.tensor([[7]]))
        value = circuit.value.repeat_interleave(4 // len(circuit.value), 0) @ seen["x"]
        torch.testing.assert_close(value, seen["heads"])  # [H, D]
        assert circuit.output.shape == (4, 32, value.shape[1])


def test_projections_with_adapters_are_read_by_what_they_do():
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules=["v_proj", "o_proj"], init_lora_weights=False)
    adapted = get_peft_model(build("llama"), lora)
    scores = copying_scores(adapted, fold_norms=True)
    assert (scores - copying_scores(build("llama"), fold_norms=True)).abs().max() > 1e-3
    torch.testing.assert_close(scores, copying_scores(adapted.merge_and_unload(), fold_norms=True), rtol=0, atol=1e-5)


def test_quantised_projections_are_read_by_what_they_do():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    module = bitsandbytes.nn.Linear4bit(64, 32, bias=True, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    keep_trainable(module)  # as models are loaded; otherwise eval mode multiplies in bfloat16
    x = torch.randn(5, 64)
    weight = weight_of(module, x)
    torch.testing.assert_close(x.double() @ weight.T + module.bias.double(), module(x).double(), rtol=1e-4, atol=1e-5)


def test_models_that_cannot_be_read_are_refused():
    with pytest.raises(ValueError, match="^model: found no norm before the attention in Olmo2DecoderLayer"):
        copying_scores(build("olmo2"), fold_norms=True)
    copying_scores(build("olmo2"), fold_norms=False)
    model = build("llama")
    model.model.layers[1].self_attn.v_proj = nn.Sequential(model.model.layers[1].self_attn.v_proj, nn.Tanh())
    with pytest.raises(ValueError, match="^model: the values of layer 1 are not what the last rows of v_proj make"):
        copying_scores(model, fold_norms=False)
    model = build("llama")
    projection = model.model.layers[0].self_attn.o_proj
    projection.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,), prepend=True)
    with pytest.raises(ValueError, match="^model: layer 0 changes the outputs of its heads before it projects them"):
        copying_scores(model, fold_norms=False)
    model = build("llama")
    model.lm_head = nn.Linear(32, 61, bias=False)
    with pytest.raises(ValueError, match=r"^model: its embedding is \(60, 32\) and its unembedding \(61, 32\)"):
        copying_scores(model, fold_norms=False)
