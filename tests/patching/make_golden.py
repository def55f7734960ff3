"""Make tests/patching/golden: head scores of small random models as TransformerLens itself computes them.

    make peers
    .venv-peers/bin/python tests/patching/make_golden.py

The models are those of attention_models.py, whose weights TransformerLens converts with its own code. Each file holds
the tokens, the induction scores of its head detector ("mul", one sequence a row) and of the stripe of its attention
patterns, the copying scores of its full OV circuits, without processing of the weights and with its default processing,
and a checksum of the weights, so that a test knows when it no longer builds the same model.
"""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from attention_models import build, checksum
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.head_detector import (
    compute_head_attention_similarity_score,
    get_induction_head_detection_pattern,
)
from transformer_lens.pretrained.weight_conversions import gpt2, llama, neox

GOLDEN = Path(__file__).parent / "golden"
LENGTH, START = 20, 1
SHAPE = {"d_model": 32, "d_head": 8, "n_heads": 4, "n_layers": 2, "n_ctx": 128, "d_vocab": 60, "device": "cpu"}
ROTARY = {"positional_embedding_type": "rotary", "rotary_adjacent_pairs": False, "rotary_base": 10000}
CASES = {
    "llama": (
        llama.convert_llama_weights,
        {
            "d_mlp": 48, "act_fn": "silu", "normalization_type": "RMS", "gated_mlp": True, "n_key_value_heads": 2,
            "rotary_dim": 8, "final_rms": True, "eps": 1e-6, "original_architecture": "LlamaForCausalLM", **ROTARY,
        },
    ),
    "gpt2": (
        gpt2.convert_gpt2_weights,
        {
            "d_mlp": 128, "act_fn": "gelu_new", "normalization_type": "LN", "eps": 1e-5,
            "scale_attn_by_inverse_layer_idx": True,
        },
    ),
    "gpt_neox": (
        neox.convert_neox_weights,
        {
            "d_mlp": 48, "act_fn": "gelu", "normalization_type": "LN", "eps": 1e-5, "rotary_dim": 2,
            "parallel_attn_mlp": True, **ROTARY,
        },
    ),
}  # fmt: skip


def lens_model(kind, *, processed):
    convert, options = CASES[kind]
    config = HookedTransformerConfig(**SHAPE, **options)
    model = HookedTransformer(config)
    with torch.no_grad():
        state = {name: value.detach().clone() for name, value in convert(build(kind), config).items()}
    model.load_and_process_state_dict(
        model.fill_missing_keys(state), fold_ln=processed, center_writing_weights=processed, center_unembed=processed,
        fold_value_biases=processed,
    )  # fmt: skip
    return model.eval()


def copying(model):
    circuit = model.embed.W_E @ model.OV @ model.unembed.W_U
    eigenvalues = circuit.eigenvalues
    return (eigenvalues.sum(-1).real / eigenvalues.abs().sum(-1)).tolist()


@torch.no_grad()
def golden(kind):
    torch.manual_seed(7)
    tokens = torch.stack([torch.randperm(57)[:LENGTH] + 3 for _ in range(3)]).repeat(1, 2)
    tokens = torch.cat([torch.full_like(tokens[:, :1], START), tokens], 1)
    model = lens_model(kind, processed=False)
    logits, cache = model.run_with_cache(tokens)
    ours = build(kind)(input_ids=tokens).logits
    assert (logits - ours).abs().max() < 1e-3 * ours.abs().max(), f"{kind}: TransformerLens runs another model"
    patterns = torch.stack([cache["pattern", layer] for layer in range(2)], 1)  # [N, layers, H, T, T]
    detected = [
        [
            [
                compute_head_attention_similarity_score(
                    head, get_induction_head_detection_pattern(row[None]), exclude_bos=False,
                    exclude_current_token=False, error_measure="mul",
                )
                for head in layer
            ]
            for layer in of_row
        ]
        for row, of_row in zip(tokens, patterns, strict=True)
    ]  # fmt: skip
    stripe = patterns.diagonal(1 - LENGTH, dim1=-2, dim2=-1)[..., -LENGTH:].mean(-1)
    return {
        "transformer_lens": version("transformer_lens"),
        "weights": checksum(build(kind)),
        "tokens": tokens.tolist(),
        "detected": detected,
        "stripe": stripe.tolist(),
        "copying": copying(model),
        "copying_processed": copying(lens_model(kind, processed=True)),
    }


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for kind in CASES:
        (GOLDEN / f"{kind}.json").write_text(json.dumps(golden(kind), indent=1) + "\n")
        print(GOLDEN / f"{kind}.json")
