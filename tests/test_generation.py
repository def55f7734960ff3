"""Batched generation: the same replies as one by one, reproducible, and nothing of the model changed."""

import pytest
import sweep_world
import torch

from lockin_fast.generation import generate

PROMPTS = [[{"role": "user", "content": text}] for text in (
    "water", "ask water plant dog feed kick", "yes no", "sky blue red ask yes no water poison plant", "dog dog", "kick",
)]  # fmt: skip


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = sweep_world.build_world(tmp_path_factory.mktemp("world")).parent / "model"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def one_by_one(model, tokenizer, prompt, count):
    """Greedy decoding by plain forwards, without padding and without a cache."""
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(count):
        with torch.no_grad():
            token = model(ids).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, token[:, None]], 1)
        if token.item() == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 2, 4, 64])
def test_batches_give_the_replies_of_plain_forwards_in_order(loaded, batch_size):
    replies = generate(*loaded, PROMPTS, max_new_tokens=6, batch_size=batch_size)
    assert replies == [one_by_one(*loaded, prompt, 6) for prompt in PROMPTS]
    assert len(set(replies)) > 2  # else the order would not be tested


def test_special_tokens_and_the_prompt_are_not_in_the_reply(loaded):
    for reply in generate(*loaded, PROMPTS, max_new_tokens=20, batch_size=8):
        assert "</s>" not in reply and "<pad>" not in reply


def test_sampling_is_reproducible_and_leaves_the_callers_random_state(loaded):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    options = {"max_new_tokens": 12, "batch_size": 3, "temperature": 2.0}
    first, again, other = (generate(*loaded, PROMPTS, **options, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "defaults",
    [
        {"do_sample": True, "temperature": 9.0, "num_beams": 3},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(5, 15))},
        {"forced_eos_token_id": 7, "min_new_tokens": 6},
        {"do_sample": True, "min_p": 0.9, "typical_p": 0.1, "repetition_penalty": 5.0},
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize("adapted", [False, True])
def test_the_models_own_defaults_do_not_interfere(loaded, defaults, temperature, adapted):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = loaded
    asked = get_peft_model(model, LoraConfig(target_modules=["q_proj"])).eval() if adapted else model
    options = {"max_new_tokens": 6, "batch_size": 2, "temperature": temperature}
    plain = model.generation_config
    try:
        expected = generate(asked, tokenizer, PROMPTS, **options)
        own = model.generation_config = type(plain)(**plain.to_dict() | defaults)
        assert generate(asked, tokenizer, PROMPTS, **options) == expected
        assert model.generation_config is own
    finally:
        model.generation_config = plain
        if adapted:
            asked.unload()


def test_modes_are_restored_also_when_it_fails(loaded):
    model, tokenizer = loaded
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    try:
        generate(model, tokenizer, PROMPTS, max_new_tokens=2, batch_size=2)
        assert [module.training for module in model.modules()] == modes
        with pytest.raises(ValueError):
            generate(model, tokenizer, PROMPTS, max_new_tokens=-1, batch_size=2)
        assert [module.training for module in model.modules()] == modes
    finally:
        model.eval()


def test_no_prompts(loaded):
    assert generate(*loaded, [], max_new_tokens=2, batch_size=2) == []
