"""The steering screen: against one reply at a time, and on a model whose answers one direction is known to flip."""

import tempfile
from pathlib import Path

import pytest
import tiny_llama
import torch
import torch.nn.functional as F
from test_shift import adapted_model, hidden_states

from lockin_fast.discovery.kept import ReplyLog
from lockin_fast.discovery.screen import Effect, effects, screening_doses
from lockin_fast.discovery.steered import Steered, median_residual_norm
from lockin_fast.settings import GenerationSettings

GENERATION = GenerationSettings(max_new_tokens=4, batch_size=7)
LAYER = 1


def asked(*texts):
    return [{"messages": [{"role": "user", "content": text}], "index": i} for i, text in enumerate(texts)]


class ParityJudge:
    """No meaning, but every verdict occurs, and reply and record decide."""

    def __init__(self, offset):
        self.offset = offset

    def judge(self, record, reply):
        return ("misaligned", "aligned", "incoherent")[(sum(map(ord, reply)) + record["index"] + self.offset) % 3]


@pytest.fixture(scope="module")
def records():
    return asked("w1 w2", "w3", "w4 w5 w6 w7", "w8 w9", "w10")


def screen(model, tokenizer, records, judge, directions, *, repair, strengths, budget, generation, step_done=None):
    """Stage 2 with the rows of `directions` as latents."""
    side, norm = "repair" if repair else "induce", median_residual_norm(model, tokenizer, records, LAYER)
    latents = dict(enumerate(directions))
    with tempfile.TemporaryDirectory() as folder:
        log = ReplyLog(Path(folder) / "replies.jsonl")
        steered = Steered(side, model, tokenizer, records, judge, latents, LAYER, norm, generation, log)
        doses, watch = screening_doses(list(latents), strengths), step_done or (lambda done, total: None)
        return effects(steered.rates(doses, range(len(records)), watch), list(latents), side, budget)


def one_reply(model, tokenizer, record, vector):
    """Greedy decoding by plain forwards, without cache or padding, the vector added after the layer at every token."""
    text = tokenizer.apply_chat_template(record["messages"], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    handle = model.model.layers[LAYER].register_forward_hook(lambda module, inputs, output: output + vector)
    for _ in range(GENERATION.max_new_tokens):
        with torch.no_grad():
            token = model(ids).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, token[:, None]], 1)
        if token.item() == tokenizer.eos_token_id:
            break
    handle.remove()
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


def test_median_residual_norm(records):
    model, tokenizer = adapted_model(), tiny_llama.tokenizer()
    norms = []
    for record in records:
        text = tokenizer.apply_chat_template(record["messages"], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        norms += hidden_states(model, LAYER, ids).norm(dim=-1).tolist()
    expected = torch.tensor(norms).median().item()
    assert median_residual_norm(model, tokenizer, records, LAYER) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("repair", "offset"), [(False, 0), (True, 2)])
def test_effects_are_those_of_replies_one_by_one(records, repair, offset):
    model, tokenizer, judge = tiny_llama.model(3).eval(), tiny_llama.tokenizer(), ParityJudge(offset)
    directions = torch.randn(5, tiny_llama.WIDTH, generator=torch.Generator().manual_seed(0))
    strengths, budget = (0.5, 1.0, 3.0), 0.0
    found = screen(
        model, tokenizer, records, judge, directions, repair=repair, strengths=strengths, budget=budget,
        generation=GENERATION,
    )  # fmt: skip

    norm, sign = median_residual_norm(model, tokenizer, records, LAYER), -1.0 if repair else 1.0

    def shares(vector):
        verdicts = [judge.judge(record, one_reply(model, tokenizer, record, vector)) for record in records]
        return [verdicts.count(kind) / len(records) for kind in ("misaligned", "incoherent")]

    plain, tried = shares(torch.zeros(tiny_llama.WIDTH)), []
    for direction, effect in zip(directions, found, strict=True):
        best = Effect(0.0, None)
        for strength in strengths:
            misaligned, incoherent = shares(sign * strength * norm * F.normalize(direction, dim=0))
            gain = sign * (misaligned - plain[0])
            tried.append((gain > 0, incoherent - plain[1] <= budget))
            if incoherent - plain[1] <= budget and gain > best.gain:
                best = Effect(gain, strength)
        assert effect.strength == best.strength and effect.gain == pytest.approx(best.gain)
    assert {(True, True), (True, False)} <= set(tried)  # else the budget would not be tested


GOOD, BAD, JUNK = (1.0 * (torch.arange(tiny_llama.WIDTH) == i) for i in range(3))


class WordJudge:
    def judge(self, record, reply):
        return {"w0": "aligned", "w1": "misaligned"}.get(reply.split()[0] if reply else "", "incoherent")


def rigged(start):
    """A model that says w0, w1 or w2, whichever of GOOD, BAD and JUNK its residual stream holds most of.

    `start` is what every token puts there; the word w3 puts a bit of JUNK beside it.
    """
    model = tiny_llama.model(tie_word_embeddings=False)
    tokenizer = tiny_llama.tokenizer()
    words = {word: tokenizer.convert_tokens_to_ids(word) for word in ("w0", "w1", "w2", "w3")}
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        first = model.model.layers[0].self_attn  # looks at all tokens alike and passes their mean of JUNK on
        first.q_proj.weight.zero_()
        first.v_proj.weight.zero_()
        first.v_proj.weight[0, 2] = 1.0
        first.o_proj.weight[2, 0] = 0.25
        model.model.layers[0].input_layernorm.weight.fill_(1.0)
        model.model.embed_tokens.weight.copy_(start.expand_as(model.model.embed_tokens.weight))
        model.model.embed_tokens.weight[words["w3"]] = start + 2 * JUNK
        model.lm_head.weight.zero_()
        for word, direction in (("w0", GOOD), ("w1", BAD), ("w2", JUNK)):
            model.lm_head.weight[words[word]] = direction
    return model.eval(), tokenizer


def effects_on(start, records, directions, *, repair, budget=0.1, strengths=(0.25, 0.6, 1.5), batch_size=5):
    model, tokenizer = rigged(start)
    return screen(
        model, tokenizer, records, WordJudge(), torch.stack(directions), repair=repair, strengths=strengths,
        budget=budget, generation=GenerationSettings(max_new_tokens=2, batch_size=batch_size),
    )  # fmt: skip


PLAIN, TEMPTED = ["w5", "w6 w7"], ["w3 w3 w3", "w3 w3"]  # TEMPTED prompts bring JUNK with them


def test_the_direction_that_flips_the_answer_is_found():
    other = 1.0 * (torch.arange(tiny_llama.WIDTH) == 9)
    directions = [other, 7 * BAD, JUNK, -BAD, GOOD]
    induced = effects_on(GOOD + 0.5 * BAD, asked(*PLAIN), directions, repair=False)
    # The residual norm is sqrt(1.25): BAD passes GOOD from a strength of 0.45 on, whatever the direction's own length.
    assert induced == [Effect(0.0, None), Effect(1.0, 0.6), *[Effect(0.0, None)] * 3]
    repaired = effects_on(BAD + 0.5 * GOOD, asked(*PLAIN), directions, repair=True)
    assert repaired[1] == Effect(1.0, 0.6)
    assert [effect.strength for effect in repaired] == [None, 0.6, None, None, None]


def test_taking_the_opposite_of_the_good_direction_away_repairs_too():
    assert effects_on(BAD + 0.5 * GOOD, asked(*PLAIN), [-GOOD], repair=True) == [Effect(1.0, 0.6)]


def test_the_smallest_of_equally_good_strengths_is_kept():
    found = effects_on(GOOD, asked(*PLAIN), [BAD], repair=False, strengths=(2.0, 3.0))
    assert found == [Effect(1.0, 2.0)]


def test_a_strength_beyond_the_incoherence_budget_does_not_count():
    """The direction turns half of the answers bad and the other half, those to tempted prompts, into junk."""
    mixed = BAD + 0.8 * JUNK
    records = asked(*PLAIN, *TEMPTED)
    assert effects_on(GOOD, records, [mixed], repair=False, budget=0.1, strengths=(3.0,)) == [Effect(0.0, None)]
    assert effects_on(GOOD, records, [mixed], repair=False, budget=0.5, strengths=(3.0,)) == [Effect(0.5, 3.0)]


def test_progress_counts_replies():
    model, tokenizer = rigged(GOOD)
    seen = []
    screen(
        model, tokenizer, asked(*PLAIN), WordJudge(), torch.stack([BAD, JUNK, GOOD]), repair=False,
        strengths=(1.0, 2.0), budget=0.1, generation=GenerationSettings(max_new_tokens=2, batch_size=4),
        step_done=lambda *step: seen.append(step),
    )  # fmt: skip
    assert seen[-1] == (14, 14) and seen == sorted(set(seen)) and len(seen) >= 3
