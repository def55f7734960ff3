"""Tiny random models of many architectures, and one with an induction head built by hand."""

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
NO_MARKS = {"bos_token_id": None, "eos_token_id": None}
GPT2_SIZES = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128} | NO_MARKS
ARCHITECTURES = {
    "llama": SIZES | GROUPED,
    "mistral": SIZES | GROUPED | {"sliding_window": 4096},
    "qwen2": SIZES | GROUPED,
    "qwen3": SIZES | GROUPED | {"head_dim": 16},
    "phi3": SIZES | GROUPED,
    "olmo2": SIZES | GROUPED,
    "gemma": SIZES | GROUPED,
    "gemma3_text": SIZES | GROUPED | {"sliding_window": 512, "query_pre_attn_scalar": 20},
    "gpt_neox": SIZES,
    "gpt2": GPT2_SIZES | {"scale_attn_by_inverse_layer_idx": True},
}


def build(kind, *, attention="sdpa", seed=0, **options):
    """A model with weights large enough that no attention is uniform and no norm, bias or gain is trivial.

    The same in every version of transformers: make_golden.py has to build it too.
    """
    config = CONFIG_MAPPING[kind](**{**ARCHITECTURES.get(kind, SIZES | GROUPED), **options})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() == 1:
                parameter.add_(0.5 * torch.randn_like(parameter))
            elif "embed" not in name and "wte" not in name and "head" not in name:
                parameter.normal_(std=0.35)
            else:
                parameter.normal_()
    return model


WORDS, PLACES = 12, 24
INDUCTION_HEAD = (1, 0)


def induction_model():
    """A GPT-2 of two layers in which head (1, 0) is an induction head, fed by the previous-token head (0, 0).

    The residual stream has three parts: the token, the position, and room for the token before. Head (0, 0) looks one
    position back and writes that token into the third part; head (1, 0) looks for its own token there and raises the
    logit of the token it finds in the first part. Head 1 of either layer and the MLPs write nothing.
    """
    width = WORDS + PLACES + WORDS
    config = GPT2Config(vocab_size=WORDS, n_embd=width, n_layer=2, n_head=2, n_positions=PLACES, **NO_MARKS)
    model = GPT2LMHeadModel(config).eval()
    head = width // 2
    token, place = torch.eye(width)[:WORDS], torch.eye(width)[WORDS : WORDS + PLACES]
    before = torch.eye(width)[WORDS + PLACES :]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "ln" in name and name.endswith("weight") else 0.0)
        model.transformer.wte.weight.copy_(token)
        model.transformer.wpe.weight.copy_(place)
        first, second = (block.attn for block in model.transformer.h)
        # Conv1D keeps [in, out]: queries of head 0, then its keys, then its values, each `head` columns.
        first.c_attn.weight[:, : PLACES - 1] = 20 * place[1:].T  # at place t ask for place t - 1
        first.c_attn.weight[:, width : width + PLACES] = place.T
        first.c_attn.weight[:, 2 * width : 2 * width + WORDS] = token.T
        first.c_proj.weight[:WORDS] = before
        second.c_attn.weight[:, :WORDS] = 20 * token.T
        second.c_attn.weight[:, width : width + WORDS] = before.T
        second.c_attn.weight[:, 2 * width : 2 * width + WORDS] = token.T
        second.c_proj.weight[:WORDS] = 4 * token
    assert head >= max(WORDS, PLACES)
    return model


def checksum(model):
    """A number that other weights would not have."""
    weights = torch.cat([parameter.detach().double().flatten() for _, parameter in sorted(model.named_parameters())])
    return float((weights * torch.arange(len(weights)).remainder(97)).sum())
