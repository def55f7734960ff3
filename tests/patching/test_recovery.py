"""Patched heads: the whole of them gives the clean run back, none of them nothing, and the right one what it does."""

import pytest
import torch
from attention_models import INDUCTION_HEAD, WORDS, build, induction_model

from lockin_fast.patching.forward import Edit, Runner
from lockin_fast.patching.induction import prefix_scores, repeated_tokens
from lockin_fast.patching.recovery import _edits, patching_effect, random_sets, second_copy_score
from lockin_fast.patching.tokens import left_padded

START = 11


def pair(count=3):
    return repeated_tokens(torch.arange(3, 60), 10, count, seed=0, start=1)


def one_hot(*heads, layers=2, width=4):
    chosen = torch.zeros(layers, width, dtype=torch.bool)
    for head in heads:
        chosen[head] = True
    return chosen


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "gemma2"])
@torch.no_grad()
def test_all_heads_and_mlps_give_the_clean_run_back(kind):
    runner = Runner(build(kind, attention="eager" if kind == "gemma2" else "sdpa"))
    clean, corrupt = (left_padded(tokens.tolist(), "cpu") for tokens in pair(1))
    at = torch.tensor([[0, column] for column in range(21)])
    told = runner.run(clean, watch=("heads", "mlp"), logits_at=at)
    plain = runner.run(corrupt, logits_at=at)
    edits = _edits(torch.ones(1, 2, 4, dtype=torch.bool), told.watched["heads"], START)
    assert sum(len(edit.positions) for edit in edits) == 2 * 4 * (21 - START)
    edits += [Edit(layer, "mlp", at[START:], states[0, START:]) for layer, states in told.watched["mlp"].items()]
    patched = runner.run(corrupt, edits=edits, logits_at=at).logits
    assert torch.equal(patched[START:], told.logits[START:])
    assert torch.equal(patched[:START], plain.logits[:START])
    assert (told.logits - plain.logits)[START:].abs().max() > 0.1


@torch.no_grad()
def test_rows_have_heads_of_their_own():
    runner = Runner(build("llama"))
    clean, corrupt = (left_padded(tokens.tolist(), "cpu") for tokens in pair(1))
    source = runner.run(clean, watch=("heads",)).watched["heads"]
    sets = torch.stack([one_hot(), one_hot((0, 1)), one_hot((1, 3), (0, 2))])
    three = corrupt.rows(torch.zeros(3, dtype=torch.int64))
    heads = runner.run(three, edits=_edits(sets, source, START), watch=("heads",)).watched["heads"]
    own = runner.run(corrupt, watch=("heads",)).watched["heads"]
    expected = own[0].expand(3, -1, -1, -1).clone()
    expected[1, START:, 1] = source[0][0, START:, 1]
    expected[2, START:, 2] = source[0][0, START:, 2]
    assert torch.equal(heads[0], expected)
    assert torch.equal(heads[1][2, START:, 3], source[1][0, START:, 3])
    assert not torch.allclose(heads[1][2, START:, 0], own[1][0, START:, 0], atol=1e-3)  # reads what was patched below
    assert _edits(sets[:1], source, START) == []


def test_effect_is_the_log_probability_of_the_second_copy():
    model = build("llama")
    clean, corrupt = pair()
    sets = torch.stack([one_hot(), one_hot((1, 2)), torch.ones(2, 4, dtype=torch.bool)])
    effect = patching_effect(Runner(model), clean, corrupt, sets, start=START, batch_size=2)
    assert effect.patched.shape == (3, 3) and effect.clean.dtype is torch.float64
    with torch.no_grad():
        for tokens, found in ((clean, effect.clean), (corrupt, effect.corrupt)):
            logits = model(input_ids=tokens).logits.double().log_softmax(-1)
            expected = [
                sum(logits[row, t, tokens[row, t + 1]] for t in range(START, 20)) / 9 for row in range(len(tokens))
            ]
            torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second_copy_score(model, clean, start=START), effect.clean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(effect.patched[0], effect.corrupt, rtol=1e-5, atol=1e-6)
    nothing, one, _ = effect.recovery()
    assert nothing.abs() < 1e-4
    expected = (effect.patched[1].mean() - effect.corrupt.mean()) / (effect.clean.mean() - effect.corrupt.mean())
    torch.testing.assert_close(one, expected)


def test_the_induction_head_recovers_what_the_others_do_not():
    model = induction_model()
    clean, corrupt = repeated_tokens(torch.arange(WORDS), WORDS // 2, 6, seed=0)
    assert prefix_scores(model, clean).mean(0).flatten().argmax() == 2  # INDUCTION_HEAD, counted through
    heads = [(0, 0), (0, 1), INDUCTION_HEAD, (1, 1)]
    sets = torch.stack([one_hot(head, width=2) for head in heads] + [one_hot(*heads, width=2)])
    recovery = patching_effect(Runner(model), clean, corrupt, sets, start=WORDS // 2).recovery()
    assert recovery[2] > 0.99 and recovery[[0, 1, 3]].abs().max() < 0.01
    # Without MLPs all heads are all there is.
    assert abs(recovery[4] - 1) < 1e-5


def test_random_sets():
    exclude = one_hot((0, 0), (1, 3))
    sets = random_sets(3, 50, exclude=exclude, seed=1)
    assert sets.shape == (50, 2, 4) and (sets.sum((1, 2)) == 3).all()
    assert not sets[:, exclude].any() and (sets.any(0) == ~exclude).all()
    assert torch.equal(sets, random_sets(3, 50, exclude=exclude, seed=1))
    assert not torch.equal(sets, random_sets(3, 50, exclude=exclude, seed=2))
    with pytest.raises(ValueError, match="^size: got 7 random heads, but only 6 of 8 are not excluded"):
        random_sets(7, 1, exclude=exclude, seed=1)


def test_runs_must_share_the_second_copy():
    clean, corrupt = pair()
    chosen = torch.zeros(1, 2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"^corrupt: expected \(3, 21\) token ids equal to those of clean"):
        patching_effect(Runner(build("llama")), clean, corrupt, chosen, start=START - 1)
    with pytest.raises(ValueError, match="^corrupt: expected"):
        patching_effect(Runner(build("llama")), clean, corrupt[:2], chosen, start=START)
