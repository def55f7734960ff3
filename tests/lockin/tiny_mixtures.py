"""Tiny random mixture-of-experts models of the families whose routers are read, one of each kind."""

import torch
import transformers

EXPERTS, CHOSEN, LAYERS = 8, 2, 3
SIZES = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
    "num_experts_per_tok": CHOSEN,
}  # fmt: skip
LATENT_ATTENTION = {
    "head_dim": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 4,
}  # fmt: skip
OPTIONS = {
    "Mixtral": {"num_local_experts": EXPERTS},
    "Qwen2Moe": {"num_experts": EXPERTS, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 2},
    "Qwen3Moe": {"num_experts": EXPERTS, "norm_topk_prob": True},
    "Olmoe": {"num_experts": EXPERTS},
    "GptOss": {"num_local_experts": EXPERTS, "sliding_window": 4},
    "DeepseekV3": {
        "n_routed_experts": EXPERTS, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, **LATENT_ATTENTION
    },
    "Glm4Moe": {"n_routed_experts": EXPERTS, "first_k_dense_replace": 1},
}  # fmt: skip
SIGMOID = ("DeepseekV3", "Glm4Moe")
SPARSE = {"Qwen2Moe": [1], "DeepseekV3": [1, 2], "Glm4Moe": [1, 2]}  # others have a router in every layer


def model(family):
    """A random model of the family in eval mode, with biases of the routers where they have any."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **OPTIONS[family]})
    made = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, value in [*made.named_parameters(), *made.named_buffers()]:
        if name.endswith(("e_score_correction_bias", "router.bias")):
            torch.nn.init.normal_(value, std=0.2)
    return made
