"""The steered generator: the tokens of a hook and `generate`, whatever shares a batch, and each piece of work once."""

import copy
import warnings

import pytest
import tiny_llama
import torch
import torch.nn.functional as F
from steered_requests import (
    LAYERS,
    NEW_TOKENS,
    PROMPTS,
    WIDTH,
    as_text,
    clear_model,
    directions,
    every_row,
    one_reply,
    prompt_ids,
)

from lockin_fast.blocking.layers import decoder_layer
from lockin_fast.steering import SteeredGenerator, SteeredRow, generate_by_hook, generate_steered, steered
from lockin_fast.steering.prompts import families
from lockin_fast.steering.rows import Wanted


def by_hook(model, rows, layer=1, *, prompts=PROMPTS, vectors=None, new_tokens=NEW_TOKENS):
    vectors = directions() if vectors is None else vectors
    return generate_by_hook(
        model, tiny_llama.tokenizer(), prompts, rows, vectors, layer=layer, max_new_tokens=new_tokens, batch_size=9
    )


def shared(model, rows, layer=1, *, prompts=PROMPTS, vectors=None, new_tokens=NEW_TOKENS, batch_size=7, **options):
    vectors = directions() if vectors is None else vectors
    return generate_steered(
        model, tiny_llama.tokenizer(), prompts, rows, vectors, layer=layer, max_new_tokens=new_tokens,
        batch_size=batch_size, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return clear_model()


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("batch_size", [1, 3, 16, 200])
def test_any_batch_size_gives_the_replies_of_generate_with_a_hook(model, layer, batch_size):
    rows = every_row()
    replies = shared(model, rows, layer, batch_size=batch_size)
    assert replies == by_hook(model, rows, layer)
    assert len(set(replies)) > 12  # else it would not show which reply is whose
    assert len({len(reply.split()) for reply in replies}) > 2  # some rows end early, others enter late


def test_both_are_what_plain_forwards_say(model):
    tokenizer, rows = tiny_llama.tokenizer(), every_row(count=1)
    expected = [as_text(tokenizer, one_reply(model, tokenizer, row, directions(), 1)) for row in rows]
    assert shared(model, rows) == expected == by_hook(model, rows)


@pytest.mark.parametrize("new_tokens", [1, 2, 30])
def test_replies_end_at_max_new_tokens(model, new_tokens):
    rows = every_row(count=2)
    replies = shared(model, rows, new_tokens=new_tokens, batch_size=8)
    assert replies == by_hook(model, rows, new_tokens=new_tokens)
    assert max(len(reply.split()) for reply in replies) == new_tokens


def test_rows_in_any_order_and_more_than_once(model):
    rows = every_row(count=2)
    rows = [rows[int(i)] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))] + rows[:7]
    assert shared(model, rows) == by_hook(model, rows)


def test_rows_that_steer_nothing(model):
    vectors = directions()
    vectors[3] = 0
    alone = [SteeredRow(p, k, c) for p in range(len(PROMPTS)) for k, c in ((-1, 2.0), (1, 0.0), (2, -0.0), (3, 5.0))]
    rows = alone + every_row(count=1)
    replies = shared(model, rows, vectors=vectors)
    assert replies == by_hook(model, rows, vectors=vectors)
    for prompt in range(len(PROMPTS)):
        assert len(set(replies[4 * prompt : 4 * prompt + 4])) == 1


@pytest.mark.parametrize("texts", [["w1 w2 w3"], ["w1 w2 w3", "w1 w2 w3"], ["w1 w2", "w1 w2 w3 w4"]])
def test_prompts_that_share_all_or_nearly_all(model, texts):
    prompts = [[{"role": "user", "content": text}] for text in texts]
    rows = [SteeredRow(p, k, 4.0) for k in range(4) for p in range(len(prompts))]
    assert shared(model, rows, prompts=prompts) == by_hook(model, rows, prompts=prompts)


def test_a_prompt_of_one_token(model):
    tokenizer = tiny_llama.tokenizer("{{ messages[0]['content'] }}")
    prompts = [[{"role": "user", "content": text}] for text in ("w1", "w2 w3", "w4")]
    rows = [SteeredRow(p, k, 4.0) for k in range(4) for p in range(len(prompts))]
    options = {"layer": 1, "max_new_tokens": 4, "batch_size": 5}
    replies = generate_steered(model, tokenizer, prompts, rows, directions(), **options)
    assert replies == generate_by_hook(model, tokenizer, prompts, rows, directions(), **options)


def test_the_end_may_be_the_first_token_and_have_several_names(model):
    rows, tokenizer = every_row(), tiny_llama.tokenizer()
    first = [one_reply(model, tokenizer, row, directions(), 1, new_tokens=1)[0] for row in rows[:3]]
    ending = copy.deepcopy(model)
    ending.generation_config.eos_token_id = sorted({2, *first})
    replies = shared(ending, rows)
    assert replies == by_hook(ending, rows)
    assert [len(reply.split()) for reply in replies[:3]] == [1, 1, 1]  # an ordinary word, so that it shows
    assert max(len(reply.split()) for reply in replies) == NEW_TOKENS


def test_a_state_beyond_all_bounds_stays_with_its_row(model):
    vectors = directions()
    wild = [SteeredRow(p, 0, 3e38) for p in range(len(PROMPTS))]  # squared in a norm it is infinite
    tame = every_row((3.0,))
    replies = shared(model, wild + tame, vectors=vectors, batch_size=4)
    assert replies[len(wild) :] == by_hook(model, tame, vectors=vectors)


def test_an_adapter_steers_with_it(model):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    adapted.eval()
    rows = every_row(count=2)
    replies = shared(adapted, rows)
    assert replies == by_hook(adapted, rows) != shared(model, rows)
    with adapted.disable_adapter():
        assert shared(adapted, rows) == shared(model, rows)


def test_a_four_bit_base(tmp_path, model):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM

    from lockin_fast.quantized import is_quantized, quantization_config

    clear_model(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    config = quantization_config("nf4", torch.float32)
    small = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map={"": "cpu"}).eval()
    assert any(is_quantized(module) for module in small.modules())
    vectors, rows = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), every_row(count=3)
    assert shared(small, rows, vectors=vectors) == by_hook(small, rows, vectors=vectors)


def logits_along(model, row, tokens, layer=1):
    """Logits [len(tokens), V] of what a steered row says, by one plain forward, in float32."""
    vector = torch.zeros(WIDTH)
    if row.direction >= 0:
        vector = row.coefficient * F.normalize(directions()[row.direction], dim=0)
    ids = prompt_ids(tiny_llama.tokenizer(), row.prompt)
    with torch.no_grad(), steered(decoder_layer(model, layer), vector[None]):
        return model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1].float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_every_token_is_the_best_but_for_rounding(dtype):
    """In float32 no token leads the one that was chosen by more than 16 bits err on the two, in a plain forward."""
    rounded, tokenizer = clear_model(dtype=dtype), tiny_llama.tokenizer()
    exact = copy.deepcopy(rounded).float()
    rows = every_row(count=2)
    generator = SteeredGenerator(rounded, tokenizer, directions(), layer=1, max_new_tokens=NEW_TOKENS, batch_size=7)
    said = generator._replies(PROMPTS, [Wanted(row.prompt, *row.steering) for row in rows])
    replies = {row: list(tokens) for tokens, rows in said for row in rows}
    for row in rows:
        tokens = replies[Wanted(row.prompt, *row.steering)]
        wanted, had = logits_along(exact, row, tokens), logits_along(rounded, row, tokens)
        chosen = wanted.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        allowed = 2 * 2 * (wanted - had).abs().amax(1)
        assert (wanted.amax(1) - chosen <= allowed).all()


def test_every_piece_of_work_is_done_once(model):
    """Counted on the model's own modules: tokens through the MLPs of the layer below and of both above."""
    endless = copy.deepcopy(model)
    endless.generation_config.eos_token_id = 999
    prompts = [[{"role": "user", "content": f"w1 w2 w{n}"}] for n in range(3, 9)]  # no padding blurs the count
    rows = [SteeredRow(p, k, c) for k in range(4) for c in (0.01, -0.01) for p in range(len(prompts))]
    tokens = [0] * LAYERS

    def count(layer):
        def see(module, inputs, output):
            tokens[layer] += inputs[0].shape[0] * inputs[0].shape[1]

        return see

    for layer in range(LAYERS):
        endless.model.layers[layer].mlp.register_forward_hook(count(layer))
    generator = SteeredGenerator(
        endless, tiny_llama.tokenizer(), directions(), layer=0, max_new_tokens=NEW_TOKENS, batch_size=48
    )
    replies = generator(prompts, rows)
    assert len(set(replies)) == len(set(replies[: len(prompts)]))  # steered so little that all say the same
    length, shared, work = 5, 3, generator.work  # <user> w1 w2 wN <assistant>
    assert work.prompt_below == length * len(prompts)
    assert work.text_below == len(prompts) * (NEW_TOKENS - 1)  # one for eight steerings
    assert tokens[0] == work.prompt_below + work.text_below
    assert work.prompt_above == 8 * shared + len(rows) * (length - 1 - shared)
    assert work.row_above == len(rows) * NEW_TOKENS
    assert tokens[1] == work.prompt_above + work.row_above
    assert tokens[2] == work.row_above  # of the prompt, the last layer computes keys and values alone


@pytest.mark.parametrize(("ids", "expected"), [
    ([[1, 2, 3]], [[0]]),
    ([[1, 2, 3, 4], [1, 2, 3, 5]], [[0, 1]]),
    ([[1, 2, 3], [4, 5, 6]], [[0, 1]]),
    ([[7, 1, 2, 3, n] for n in range(4)] + [[7, 4, 5, 6, n] for n in range(4)], [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ([[7, 1, 2, 8, 9, n, m] for n in range(2) for m in range(3)], [[0, 1, 2, 3, 4, 5]]),
    ([[1], [1, 2]], [[0, 1]]),
])  # fmt: skip
def test_prompts_of_a_family_share_what_saves_tokens(ids, expected):
    assert families(ids) == expected


def test_prompts_of_several_families(model):
    texts = [f"w{n} w{n} w{n} w{n} w{m}" for n in (1, 2, 3) for m in range(10, 14)] + ["w1 w5", "w2"]
    prompts = [[{"role": "user", "content": text}] for text in texts]
    rows = [SteeredRow(p, k, c) for k in range(3) for c in (4.0, -8.0) for p in range(len(prompts)) if (p + k) % 5]
    for batch_size in (2, 11, 200):
        assert shared(model, rows, prompts=prompts, batch_size=batch_size) == by_hook(model, rows, prompts=prompts)


def test_what_is_complete_is_told_at_once(model):
    rows, told = every_row(), []
    replies = shared(model, rows, batch_size=8, done=lambda finished: told.append(dict(finished)))
    assert sorted(number for finished in told for number in finished) == list(range(len(rows)))
    assert all(replies[number] == text for finished in told for number, text in finished.items())
    assert len(told) > len(rows) / 8


def test_the_model_is_itself_between_two_replies_and_after_a_failure(model):
    ids, rows = torch.tensor([prompt_ids(tiny_llama.tokenizer(), 0)]), every_row()
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        before = model(ids).logits

        def ask(finished):
            assert torch.equal(model(ids).logits, before)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            shared(model, rows, done=ask)
        assert torch.equal(model(ids).logits, before)
    assert [module.training for module in model.modules()] == modes
    assert not any("forward" in module.__dict__ for module in model.modules())
    model.eval()


def test_a_forward_of_someone_elses_is_put_back(model):
    ours = copy.deepcopy(model)
    first = ours.model.layers[0]
    theirs = first.forward = first.forward  # as accelerate does
    rows = every_row(count=1)
    assert shared(ours, rows) == shared(model, rows)
    assert first.__dict__["forward"] is theirs


def test_nothing_asked(model):
    assert shared(model, []) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": [SteeredRow(5, 0, 1.0)]}, "rows: row 0 has prompt 5, expected 0 to 4"),
        ({"rows": [SteeredRow(0, 0, 1.0), SteeredRow(0, 4, 1.0)]}, "rows: row 1 has direction 4, expected 0 to 3"),
        ({"rows": [SteeredRow(0, -2, 1.0)]}, "rows: row 0 has direction -2"),
        ({"rows": [SteeredRow(0, 0, float("nan"))]}, "rows: row 0 has the coefficient nan"),
        ({"layer": 3}, "layer: got 3, expected 0 to 2"),
        ({"new_tokens": 0}, "max_new_tokens: got 0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"vectors": torch.zeros(4, 31)}, r"directions: got torch.float32 \[4, 31\], expected floating"),
        ({"vectors": torch.zeros(4, 32, dtype=torch.int64)}, "directions: got torch.int64"),
        ({"vectors": torch.zeros(32)}, r"directions: got torch.float32 \[32\]"),
    ],
)
@pytest.mark.parametrize("splits", [True, False])
def test_what_is_out_of_range_is_refused_before_any_work(model, changed, message, splits, monkeypatch):
    monkeypatch.setattr(type(model), "forward", None)
    monkeypatch.setattr(model.config, "model_type", "llama" if splits else "unheard-of")
    with pytest.raises(ValueError, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shared(model, **{"rows": every_row(), **changed})
