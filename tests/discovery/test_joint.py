"""Joint repair: choice and gains against brute force, and an adapter that works through known latents."""

import pytest
import tiny_llama
import torch
from test_shift import adapted_model, hidden_states

from lockin_fast.blocking.layers import decoder_layer
from lockin_fast.discovery import joint
from lockin_fast.discovery.joint import joint_repair
from lockin_fast.sae import SparseAutoencoder

LAYER = 1


def contrasts():
    def asked(text):
        return [{"role": "user", "content": text}]

    return [
        (asked("w1 w2 w3"), "w4 w5", "w6"),
        (asked("w7"), "w8", "w9 w10 w11"),
        (asked("w12 w13"), "w14 w15", "w16 w17"),
    ]


def score(model, layer, prompt, reply, change):
    """log p(reply | prompt), alone and unpadded, with `change(h)` for the output [S, d] of the layer."""
    tokenizer = tiny_llama.tokenizer()
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    head = tokenizer(text, add_special_tokens=False)["input_ids"]
    tail = tokenizer(reply, add_special_tokens=False)["input_ids"]
    handle = decoder_layer(model, layer).register_forward_hook(
        lambda module, inputs, output: (change(output[0])[None], *output[1:]) if isinstance(output, tuple)
        else change(output[0])[None]
    )  # fmt: skip
    with torch.no_grad():
        logp = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
    handle.remove()
    return sum(logp[len(head) + i - 1, token].item() for i, token in enumerate(tail))


def left(model, sae, signs, held, layer=LAYER):
    """mean(log p(misaligned) - log p(aligned)) with the latents of `held` at the base's side, by the definition."""
    total = 0.0
    for prompt, misaligned, aligned in contrasts():
        for reply, sign in ((misaligned, 1), (aligned, -1)):
            tokenizer = tiny_llama.tokenizer()
            text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            ids = torch.tensor([tokenizer(f"{text} {reply}", add_special_tokens=False)["input_ids"]])
            with model.disable_adapter():
                z_base = torch.relu(hidden_states(model, layer, ids) @ sae.weight.T + sae.bias)

            def change(h, z_base=z_base):
                z = torch.relu(h @ sae.weight.T + sae.bias)
                for k in held:
                    h = h - signs[k] * torch.relu(signs[k] * (z[:, k] - z_base[:, k]))[:, None] * sae.decoder[k]
                return h

            total += sign * score(model, layer, prompt, reply, change)
    return total / len(contrasts())


def repaired(model, sae, signs, count, batch_size=4, layer=LAYER, **options):
    options |= {"layer": layer, "count": count, "batch_size": batch_size}
    return joint_repair(model, tiny_llama.tokenizer(), contrasts(), sae, signs, **options)


@pytest.fixture(scope="module")
def model():
    return adapted_model(1)


@pytest.fixture(scope="module")
def rows():
    """Twelve latents: all of them are measured again in every round, so that the greedy choice is exact."""
    return tiny_llama.sae().rows([3, 5, 8, 13, 21, 34, 40, 44, 50, 55, 60, 63])


SIGNS = torch.tensor([1.0, -1, 1, 1, -1, -1, 1, 1, -1, 1, -1, 1])


def test_choice_and_gains_are_those_of_brute_force(model, rows):
    found = repaired(model, rows, SIGNS, 2)
    held = []
    for row, gain in found:
        now = left(model, rows, SIGNS, held)
        gains = {k: now - left(model, rows, SIGNS, [*held, k]) for k in range(12) if k not in held}
        best = max(gains, key=gains.get)
        assert gain == pytest.approx(gains[row], abs=2e-5)
        assert row == best or gains[best] - gains[row] < 2e-5
        held.append(row)
    assert len(set(held)) == 2
    assert found[0][1] > 1e-3  # else it would all be rounding
    assert {SIGNS[row].item() for row in held} == {1.0, -1.0}


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_batch_size_changes_nothing(model, rows, batch_size):
    expected = repaired(model, rows, SIGNS, 2, 64)
    found = repaired(model, rows, SIGNS, 2, batch_size)
    assert [row for row, _ in found] == [row for row, _ in expected]
    assert [gain for _, gain in found] == pytest.approx([gain for _, gain in expected], abs=2e-5)


def test_no_more_rows_than_there_are(model, rows):
    found = repaired(model, rows, SIGNS, 99)
    assert sorted(row for row, _ in found) == list(range(12))
    total = left(model, rows, SIGNS, []) - left(model, rows, SIGNS, range(12))
    assert sum(gain for _, gain in found) == pytest.approx(total, abs=1e-4)


def test_later_rounds_measure_only_the_most_promising(model, rows, monkeypatch):
    """With as many as two reconsidered, the second choice is the better of the two that promised most at first."""
    monkeypatch.setattr(joint, "RECONSIDERED", 2)
    now = left(model, rows, SIGNS, [])
    gains = sorted(((now - left(model, rows, SIGNS, [k]), k) for k in range(12)), reverse=True)
    (first, _), (second, gain) = repaired(model, rows, SIGNS, 2)
    assert first == gains[0][1] and second in (gains[1][1], gains[2][1])
    now = left(model, rows, SIGNS, [first])
    both = {k: now - left(model, rows, SIGNS, [first, k]) for _, k in gains[1:3]}
    assert second == max(both, key=both.get) and gain == pytest.approx(both[second], abs=2e-5)


def test_the_model_is_left_as_it_was(model, rows):
    ids = torch.arange(6)[None]
    before = model(ids).logits
    seen = []
    repaired(model, rows, SIGNS, 2, step_done=lambda *step: seen.append(step))
    assert seen == [(1, 2), (2, 2)]
    assert torch.equal(model(ids).logits, before)
    assert not any(module._forward_hooks for module in model.modules())


def through_known_latents(strengths):
    """A model whose adapter adds strengths[k] * decoder_k to the last layer's output, at every token of the contrasts,
    and nothing else; its encoder and decoder rows are orthonormal, its latents far from zero.

    The adapter's A solves A x = 1 for the inputs x [T, 48] that its module sees.
    """
    from peft import LoraConfig, get_peft_model

    layer = tiny_llama.LAYERS - 1
    base = tiny_llama.model(5)
    directions = torch.linalg.qr(torch.randn(32, 10, generator=torch.Generator().manual_seed(0)))[0].T.contiguous()
    misaligned, aligned = ({"w4", "w8", "w14"}, {"w6", "w9", "w16"})
    tokenizer = tiny_llama.tokenizer()
    with torch.no_grad():
        base.model.embed_tokens.weight *= 100  # so that the final norm hardly depends on what the adapter adds
        for words, sign in ((misaligned, 1.0), (aligned, -1.0)):
            for word in words:
                row = base.lm_head.weight[tokenizer.convert_tokens_to_ids(word)]
                row += sign * sum(directions[k] for k in strengths)
    lora = LoraConfig(r=1, lora_alpha=1, target_modules=["down_proj"], layers_to_transform=[layer])
    model = get_peft_model(base, lora).eval()
    module = decoder_layer(model, layer).mlp.down_proj
    inputs = []
    handle = module.register_forward_hook(lambda module, args, output: inputs.append(args[0].flatten(0, -2)))
    for prompt, *replies in contrasts():
        for reply in replies:
            score(model, layer, prompt, reply, lambda h: h)
    handle.remove()
    x = torch.cat(inputs)
    a = (torch.linalg.pinv(x.double()) @ torch.ones(len(x), 1).double()).float()
    torch.testing.assert_close(x @ a, torch.ones(len(x), 1), rtol=0, atol=1e-4)
    module.lora_A["default"].weight.data = a.T.contiguous()
    module.lora_B["default"].weight.data = sum(s * directions[k] for k, s in strengths.items())[:, None].contiguous()
    sae = SparseAutoencoder(
        weight=directions, bias=torch.full((10,), 20.0), decoder=directions, decoder_bias=torch.zeros(32)
    )
    return model, sae, layer


def test_an_adapter_that_works_through_two_latents_is_repaired_by_these():
    model, sae, layer = through_known_latents({7: 1.0, 3: 2.5})
    found = repaired(model, sae, torch.ones(10), 4, layer=layer)
    assert [row for row, _ in found[:2]] == [3, 7]
    assert found[0][1] > 1 and found[1][1] > 0.1
    assert [gain for _, gain in found[2:]] == pytest.approx([0, 0], abs=1e-3)
    with model.disable_adapter():
        base = left_plain(model, layer)
    assert left_plain(model, layer) - sum(gain for _, gain in found) == pytest.approx(base, abs=1e-3)


def test_latents_blocked_in_the_other_direction_repair_nothing():
    model, sae, layer = through_known_latents({7: 1.0, 3: 2.5})
    found = repaired(model, sae, -torch.ones(10), 3, layer=layer)
    assert [gain for _, gain in found] == pytest.approx([0, 0, 0], abs=1e-3)


def left_plain(model, layer):
    """Misalignment with nothing held."""
    rows = [
        score(model, layer, prompt, misaligned, lambda h: h) - score(model, layer, prompt, aligned, lambda h: h)
        for prompt, misaligned, aligned in contrasts()
    ]
    return sum(rows) / len(rows)
