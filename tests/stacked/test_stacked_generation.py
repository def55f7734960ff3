"""Replies of a stack: for every adapter those that it gives alone, whatever shares the batch."""

import pytest
import tiny_llama as tiny
import torch

from lockin_fast.generation import generate
from lockin_fast.lora import LoraSettings, adapter
from lockin_fast.stacked import AdapterStack, size
from lockin_fast.stacked.generation import generate_stacked
from lockin_fast.stacked.stack import exporting

ADAPTERS = 5
PROMPTS = [[{"role": "user", "content": text}] for text in ("w1 w2", "w3", "w4 w5 w6 w7", "w8 w1", "w9 w2 w3")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(model, stack of adapters that change what the model says, their PEFT folders)."""
    folder, model = tmp_path_factory.mktemp("adapters"), tiny.model(initializer_range=0.3)
    stack = AdapterStack.fresh(model, LoraSettings(r=2, alpha=4), range(ADAPTERS))
    torch.manual_seed(0)
    stack.weights.normal_(std=0.3)
    with exporting(model, stack.lora) as save:
        for n, row in enumerate(stack.weights):
            save(row, folder / str(n))
    return model, stack, [folder / str(n) for n in range(ADAPTERS)]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
@pytest.mark.parametrize(("batch_size", "budget"), [(2, 0), (5, 0), (12, 0), (12, 2**20)])
def test_replies_are_those_of_single_adapters(made, batch_size, budget, temperature, monkeypatch):
    model, stack, folders = made
    monkeypatch.setattr(size, "GENERATION_BYTES", budget)
    options = {"max_new_tokens": 8, "batch_size": batch_size, "temperature": temperature}
    model.train()
    together = generate_stacked(stack, tiny.tokenizer(), PROMPTS, seeds=range(ADAPTERS), **options)
    assert model.training
    alone = []
    for seed, folder in enumerate(folders):
        with adapter(model, folder) as adapted:
            alone.append(generate(adapted, tiny.tokenizer(), PROMPTS, seed=seed, **options))
    assert together == alone
    assert len({tuple(replies) for replies in alone}) == ADAPTERS
    if temperature:  # some rows end before others, whose adapters go on drawing
        assert len({len(reply.split()) for replies in alone for reply in replies}) > 2


def test_equal_seeds_draw_equally_and_the_callers_random_state_stays(made):
    model, stack, _ = made
    twice = AdapterStack(model, stack.lora, stack.weights[[0, 0]], stack.names)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    options = {"max_new_tokens": 8, "batch_size": 64, "temperature": 1.0}
    first, second = generate_stacked(twice, tiny.tokenizer(), PROMPTS, seeds=[3, 3], **options)
    assert first == second and torch.equal(torch.rand(3), expected)
    first, second = generate_stacked(twice, tiny.tokenizer(), PROMPTS, seeds=[3, 4], **options)
    assert first != second


def test_nothing_is_asked_of_an_empty_list(made):
    assert generate_stacked(made[1], tiny.tokenizer(), [], max_new_tokens=1, batch_size=1) == [[]] * ADAPTERS
