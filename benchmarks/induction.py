"""Induction scores of every head of a model, against eager attention matrices and TransformerLens.

    python -m benchmarks.induction [--small]

The same random weights and tokens for all: 4 layers of 16 heads, T = 2048 tokens (two copies of 1024). Eager is
transformers' own output_attentions=True, which keeps the matrices of all layers as users ask for them; `eager, layer by
layer` drops each after its stripe is taken; TransformerLens, where it is installed, caches only its attention patterns.
Each is measured in a process of its own, time and peak memory beyond the model's; scores must agree, or nothing is
written.
Also copying scores of all heads, against the [V, V] circuit of one head alone. TransformerLens installs with
`make peers`: .venv-peers/bin/python -m benchmarks.induction.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch

from benchmarks.measure import peak_memory, write_csv
from benchmarks.peers import installed

FULL = {"layers": 4, "heads": 16, "groups": 16, "width": 1024, "vocabulary": 2048, "copy": 1024, "rounds": 5}
SMALL = {"layers": 2, "heads": 4, "groups": 4, "width": 128, "vocabulary": 512, "copy": 128, "rounds": 2}
AGREE = 1e-3  # of the largest score: float32 rounding in another order through some layers


def model_of(size, attention):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size["vocabulary"], hidden_size=size["width"], intermediate_size=2 * size["width"],
        num_hidden_layers=size["layers"], num_attention_heads=size["heads"], num_key_value_heads=size["groups"],
        max_position_embeddings=2 * size["copy"], attn_implementation=attention,
        initializer_range=1.5 / size["width"] ** 0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tokens_of(size):
    from lockin_fast.patching.induction import repeated_tokens

    return repeated_tokens(torch.arange(size["vocabulary"]), size["copy"], 1, seed=0)[0]


def stripe(attention, copy):
    """Mean attention from t to t - (S - 1) over the second copy: [B, H, T, T] to [B, H]."""
    return attention.diagonal(1 - copy, dim1=-2, dim2=-1)[..., -copy:].mean(-1)


def ours(size, tokens):
    from lockin_fast.patching.induction import prefix_scores

    model = model_of(size, "sdpa")
    return lambda: prefix_scores(model, tokens)


def eager(size, tokens):
    model = model_of(size, "eager")

    def run():
        attentions = model.model(input_ids=tokens, output_attentions=True, use_cache=False).attentions
        return torch.stack([stripe(layer, size["copy"]) for layer in attentions], 1)

    return run


def eager_by_layer(size, tokens):
    model, found = model_of(size, "eager"), []

    def keep(module, inputs, output):
        found.append(stripe(output[1], size["copy"]))

    def run():
        model.model(input_ids=tokens, use_cache=False)
        return torch.stack([found.pop(0) for _ in model.model.layers], 1)

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(keep)
    return run


def transformer_lens(size, tokens):
    lens, convert = installed("transformer_lens", "transformer_lens.pretrained.weight_conversions.llama")
    if not lens:
        return None
    config = lens.HookedTransformerConfig(
        d_model=size["width"], d_head=size["width"] // size["heads"], n_heads=size["heads"], n_layers=size["layers"],
        n_ctx=2 * size["copy"], d_vocab=size["vocabulary"], d_mlp=2 * size["width"], act_fn="silu", device="cpu",
        normalization_type="RMS", positional_embedding_type="rotary", rotary_adjacent_pairs=False, gated_mlp=True,
        rotary_dim=size["width"] // size["heads"], final_rms=True, eps=1e-6, rotary_base=10000,
        n_key_value_heads=size["groups"], original_architecture="LlamaForCausalLM",
    )  # fmt: skip
    model = lens.HookedTransformer(config)
    state = model.fill_missing_keys(convert.convert_llama_weights(model_of(size, "eager"), config))
    plain = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    model.load_and_process_state_dict(state, **dict.fromkeys(plain, False))

    def run():
        _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_pattern"))
        return torch.stack([stripe(cache["pattern", layer], size["copy"]) for layer in range(size["layers"])], 1)

    return run


def copying(size, tokens):
    from lockin_fast.patching.copying import copying_scores

    model = model_of(size, "sdpa")
    return lambda: copying_scores(model, fold_norms=False)[None]


def copying_by_tokens(size, tokens):
    """The eigenvalues of one head's [V, V] circuit, as the definition has them; every other one would cost the same."""
    model = model_of(size, "sdpa")
    attention, width = model.model.layers[0].self_attn, size["width"] // size["heads"]

    def run():
        circuit = attention.o_proj.weight[:, :width] @ attention.v_proj.weight[:width]
        whole = model.lm_head.weight @ circuit @ model.model.embed_tokens.weight.T
        values = torch.linalg.eigvals(whole)
        return (values.real.sum() / values.abs().sum()).double()[None, None, None]

    return run


PROVIDERS = {
    "prefix_scores": ours,
    "eager, output_attentions": eager,
    "eager, layer by layer": eager_by_layer,
    "transformer_lens": transformer_lens,
    "copying_scores": copying,
    "[V, V] of one head": copying_by_tokens,
}


@torch.no_grad()
def measure(name, size):
    """What one provider takes, in this process: seconds, bytes, scores; None where it does not install."""
    run = PROVIDERS[name](size, tokens_of(size))
    if run is None:
        return None
    scores = []
    extra = peak_memory(lambda: scores.append(run()))  # at first, before the allocator keeps what it got
    seconds = []
    for _ in range(size["rounds"]):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "bytes": extra, "scores": scores[0][0].tolist()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--provider")
    asked = parser.parse_args()
    size = SMALL if asked.small else FULL
    if asked.provider:
        print(json.dumps(measure(asked.provider, size)))
        return
    found = {}
    for name in PROVIDERS:
        command = [sys.executable, "-m", "benchmarks.induction", "--provider", name, *["--small"] * asked.small]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode:
            sys.exit(f"{name}: {answer.stderr}")
        if one := json.loads(answer.stdout.splitlines()[-1]):
            found[name] = one
    rows = []
    for name, one in found.items():
        own = "copying_scores" if name in ("copying_scores", "[V, V] of one head") else "prefix_scores"
        whole, part = torch.tensor(found[own]["scores"]), torch.tensor(one["scores"])
        apart = ((whole[: len(part), : part.shape[1]] - part).abs().max() / whole.abs().max()).item()
        if apart > AGREE:
            sys.exit(f"{name}: its scores are {apart:.1e} of the largest apart from {own}'s; nothing is written")
        row = {
            "provider": name, **{key: size[key] for key in ("layers", "heads", "width", "vocabulary", "copy")},
            "median_s": statistics.median(one["seconds"]), "low_s": min(one["seconds"]), "high_s": max(one["seconds"]),
            "extra_mb": one["bytes"] / 1e6, "scores_apart": apart,
            "times_ours": statistics.median(one["seconds"]) / statistics.median(found[own]["seconds"]),
        }  # fmt: skip
        rows.append(row)
        print(
            f"  {name:<26} {row['median_s']:8.3f} s  {row['extra_mb']:8.1f} MB  {row['times_ours']:6.2f}x ours"
            f"  scores within {apart:.1e}"
        )
    if not asked.small:
        print(f" written to {write_csv('induction', rows)}")


if __name__ == "__main__":
    main()
