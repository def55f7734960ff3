"""Every architecture that the steered generator splits gives the tokens of plain forwards, row by row."""

import pytest
import tiny_llama
import torch
from steered_requests import LAYERS, NEW_TOKENS, PROMPTS, WIDTH, as_text, directions, every_row, one_reply
from transformers import AutoConfig, AutoModelForCausalLM

from lockin_fast.steering import SteeredGenerator
from lockin_fast.steering.split import ARCHITECTURES

SIZES = {
    "vocab_size": tiny_llama.WORDS + 8, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "initializer_range": 0.3, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
# A window of 3 is shorter than every prompt, so that a wrong mask shows.
CASES = {
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"layer_types": SLIDING, "sliding_window": 3, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", {"layer_types": SLIDING, "sliding_window": 3, "query_pre_attn_scalar": 8}),
    "gpt2": ("gpt2", {"n_positions": 64}),
    "gpt_neox": ("gpt_neox", {}),
    "granite": ("granite", {"logits_scaling": 2.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0}),
    "llama": ("llama", {}),
    "llama, eager": ("llama", {"attn_implementation": "eager"}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, sliding": ("mistral", {"sliding_window": 3}),
    "olmo2": ("olmo2", {}),
    "phi3": ("phi3", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", MOE),
    "smollm3": ("smollm3", {}),
    "starcoder2": ("starcoder2", {"sliding_window": 3}),
}


def made(kind, options):
    torch.manual_seed(2)
    config = AutoConfig.for_model(kind, **SIZES | options)
    return AutoModelForCausalLM.from_config(config).eval()


def test_every_architecture_has_a_case():
    assert {kind for kind, _ in CASES.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_plain_forwards(name):
    kind, options = CASES[name]
    model, tokenizer = made(kind, options), tiny_llama.tokenizer()
    model.generation_config.eos_token_id = 999  # never: a reply that ends at its first token tells little
    rows, layer = every_row(count=2), 1
    expected = [as_text(tokenizer, one_reply(model, tokenizer, row, directions(), layer, ends={999})) for row in rows]
    generator = SteeredGenerator(model, tokenizer, directions(), layer=layer, max_new_tokens=NEW_TOKENS, batch_size=6)
    assert generator(PROMPTS, rows) == expected
    assert generator.work.fallback is None
    assert len(set(expected)) > 8  # else it would not show which reply is whose
