"""Attribution: the gradient against finite steps of steering, directions against a whole product, ranks by hand."""

import pytest
import tiny_llama
import torch
from test_joint import contrasts
from test_shift import adapted_model

from lockin_fast.blocking.layers import decoder_layer
from lockin_fast.discovery import attribution
from lockin_fast.discovery.attribution import agreement, attributions, score_gradient

LAYER = 1


@pytest.fixture(scope="module")
def model():
    return adapted_model(1).double()


def gradient(model, batch_size=4, **options):
    return score_gradient(model, tiny_llama.tokenizer(), contrasts(), LAYER, batch_size=batch_size, **options)


def score(model, vector):
    """mean(log p(misaligned) - log p(aligned)) with `vector` added at every position: one row at a time, unpadded."""
    tokenizer, total = tiny_llama.tokenizer(), 0.0
    handle = decoder_layer(model, LAYER).register_forward_hook(
        lambda module, inputs, output: (output[0] + vector, *output[1:]) if isinstance(output, tuple)
        else output + vector
    )  # fmt: skip
    for prompt, *replies in contrasts():
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        head = tokenizer(text, add_special_tokens=False)["input_ids"]
        for reply, sign in zip(replies, (1, -1), strict=True):
            tail = tokenizer(reply, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logp = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
            total += sign * sum(logp[len(head) + i - 1, token].item() for i, token in enumerate(tail))
    handle.remove()
    return total / len(contrasts())


def test_the_gradient_is_what_small_steps_of_steering_do(model):
    found, slope = gradient(model)
    nothing = torch.zeros(tiny_llama.WIDTH, dtype=torch.float64)
    assert found == pytest.approx(score(model, nothing), rel=1e-6)  # its norms are in fp32, whatever it is in
    units = torch.nn.functional.normalize(torch.randn(5, tiny_llama.WIDTH, dtype=torch.float64), dim=1)
    step = 1e-2  # central differences: truncation of order step^2, rounding of order 1e-7 / step
    for unit in units:
        central = (score(model, step * unit) - score(model, -step * unit)) / (2 * step)
        assert (slope @ unit).item() == pytest.approx(central, abs=1e-3 * slope.norm().item())
    assert slope.norm() > 1e-2


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_batch_changes_nothing_but_rounding(model, batch_size):
    steps = []
    found, slope = gradient(model, batch_size, step_done=lambda *step: steps.append(step))
    expected, slope_expected = gradient(model)
    assert found == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(slope, slope_expected, rtol=1e-5, atol=1e-6)
    assert steps[-1] == (6, 6)


def test_the_model_is_left_as_it_was():
    model = adapted_model(1).train()
    asking = {name for name, p in model.named_parameters() if p.requires_grad}
    assert asking
    gradient(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == asking
    assert all(p.grad is None for p in model.parameters()) and all(m.training for m in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_below_build_no_graph(model):
    needed = []
    handle = decoder_layer(model, LAYER - 1).register_forward_hook(
        lambda module, inputs, output: needed.append((output[0] if isinstance(output, tuple) else output).requires_grad)
    )
    gradient(model)
    handle.remove()
    assert needed == [False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_directions_are_read_in_blocks(dtype, monkeypatch):
    rows, slope = torch.randn(50, 32).to(dtype), torch.randn(32)
    rows[7] = 0
    monkeypatch.setattr(attribution, "BLOCK_ELEMENTS", 32 * 9)
    found = attributions(slope, rows)
    expected = (rows.double() @ slope.double()) / rows.double().norm(dim=1).clamp_min(1e-30)
    # sums of 32 products in fp32, of directions of unit length
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=64 * 1.2e-7 * slope.norm().item())
    assert found[7] == 0


def test_ranks_agree_by_hand():
    found = agreement([4.0, 3.0, 2.0, 1.0], [0.4, 0.3, 0.2, 0.1], 2)
    assert found == {"spearman": pytest.approx(1.0), "overlap": 1.0, "chance": 0.5}
    assert agreement([1.0, 2.0, 3.0, 4.0], [0.4, 0.3, 0.2, 0.1], 2)["spearman"] == pytest.approx(-1.0)
    assert agreement([1.0, 2.0, 3.0, 4.0], [0.4, 0.3, 0.2, 0.1], 2)["overlap"] == 0.0
    # ties: ranks 1.5, 1.5, 3, 4 against 1, 2, 3.5, 3.5; deviations (-1, -1, .5, 1.5) and (-1.5, -.5, 1, 1)
    tied = agreement([0.0, 0.0, 1.0, 2.0], [0.1, 0.2, 0.3, 0.3], 3)
    assert tied["spearman"] == pytest.approx((1.5 + 0.5 + 0.5 + 1.5) / 4.5)


def test_nothing_that_works_leaves_no_overlap_and_no_correlation():
    assert agreement([1.0, 2.0], [0.0, 0.0], 2) == {"spearman": None, "overlap": None, "chance": None}
    found = agreement([3.0, 2.0, 1.0, 0.0], [0.5, 0.0, 0.0, 0.0], 3)  # only one latent does anything
    assert found["overlap"] == 1.0 and found["chance"] == 0.25


def test_no_contrast_is_refused(model):
    with pytest.raises(ValueError, match="^contrasts: got none"):
        score_gradient(model, tiny_llama.tokenizer(), [], LAYER, batch_size=2)
