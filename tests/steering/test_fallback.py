"""Models that cannot be split at a layer: told by name, and answered by a hook all the same."""

import copy

import pytest
import tiny_llama
import torch
from steered_requests import LAYERS, PROMPTS, WIDTH, as_text, clear_model, directions, every_row, one_reply
from transformers import OPTConfig, OPTForCausalLM

from lockin_fast.steering import SteeredGenerator
from lockin_fast.steering.split import why_not_split


def opt():
    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(
        vocab_size=tiny_llama.WORDS + 8, hidden_size=WIDTH, num_hidden_layers=LAYERS, ffn_dim=48, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=WIDTH, init_std=0.3, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )).eval()  # fmt: skip


def test_an_unknown_architecture_is_steered_by_a_hook_and_says_so():
    model, tokenizer, rows, told = opt(), tiny_llama.tokenizer(), every_row(count=2), []
    with pytest.warns(UserWarning, match="steering: opt is not among the architectures gemma, .*slower"):
        generator = SteeredGenerator(model, tokenizer, directions(), layer=1, max_new_tokens=4, batch_size=7)
    replies = generator(PROMPTS, rows, lambda finished: told.append(dict(finished)))
    assert replies == [
        as_text(tokenizer, one_reply(model, tokenizer, row, directions(), 1, new_tokens=4)) for row in rows
    ]
    assert len(set(replies)) > 4
    assert generator.work.fallback.startswith("opt is not among") and generator.work.steps == 0
    assert [len(finished) for finished in told] == [7, 7, 6]
    assert {number: reply for finished in told for number, reply in finished.items()} == dict(enumerate(replies))


def with_config(**changed):
    model = clear_model()
    for name, value in changed.items():
        setattr(model.config, name, value)
    return model


def compiled():
    model = clear_model()
    model.model.layers[0].compile()
    return model


def prompt_tuned():
    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(clear_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (clear_model, None),
        (lambda: with_config(_attn_implementation_internal="flash_attention_2"), "'flash_attention_2' takes no mask"),
        (lambda: with_config(layer_types=["full_attention", "chunked_attention"]), "kinds chunked_attention, full_att"),
        (lambda: with_config(use_bidirectional_attention=True), "bidirectional attention"),
        (lambda: with_config(rope_parameters={"rope_type": "longrope"}), "depends on the longest row"),
        (lambda: with_config(rope_parameters={"full_attention": {"rope_type": "dynamic"}}), "depends on the longest"),
        (compiled, "compiled"),
        (prompt_tuned, "PROMPT_TUNING changes the prompt"),
    ],
)
def test_why_a_model_is_not_split(model, reason):
    found = why_not_split(model())
    assert (found is None) if reason is None else (reason in found)


def test_a_wrapper_of_several_models_is_not_split():
    model = clear_model()
    text = copy.copy(model.config)
    model.config.get_text_config = lambda: text
    model.config.model_type = "llava"
    assert why_not_split(model) == "llava is a wrapper of several models"
