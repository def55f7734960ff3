"""Margins of stances under edits: whole runs steered by a hook, gradients, and edits that do flip a model."""

import pytest
import tiny_llama
import torch

from lockin_fast.lockin.robustness import Search, flips_along, flips_downhill, robustness
from lockin_fast.lockin.stances import StanceMargins, StanceTokens, stance_tokens
from lockin_fast.lockin.suite_files import Stance
from lockin_fast.patching.forward import Runner
from lockin_fast.steering.hook import steered

STANCES = [
    StanceTokens([5, 9, 11, 30, 8, 22, 40], [13, 14, 15], [16]),
    StanceTokens([7, 7, 31], [19], [21, 22]),
    StanceTokens([12], [25, 26], [17, 18]),
]
LAYERS = range(tiny_llama.LAYERS)


@pytest.fixture(scope="module")
def model():
    return tiny_llama.model(initializer_range=0.3).eval()


@pytest.fixture(scope="module")
def exact():
    return tiny_llama.model(initializer_range=0.3).eval().double()


@pytest.fixture(scope="module")
def runner(model):
    return Runner(model)


def edits(scale=1.0, seed=0):
    return scale * torch.randn(len(STANCES), tiny_llama.WIDTH, generator=torch.Generator().manual_seed(seed))


def by_hook(model, layer, vectors):
    """The margins, a reply at a time through the whole model; differentiable."""
    found = []
    for stance, vector in zip(STANCES, vectors, strict=True):
        told = []
        for reply in (stance.held, stance.opposite):
            ids = torch.tensor([[*stance.prompt, *reply]])
            with steered(model.model.layers[layer], vector[None]):
                logits = model(ids).logits[0, len(stance.prompt) - 1 : -1]
            told.append(logits.log_softmax(-1)[range(len(reply)), list(reply)].sum())
        found.append(told[0] - told[1])
    return torch.stack(found)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_margins_are_those_of_whole_runs_under_steering(model, exact, runner, layer, batch_size, scale):
    margins = StanceMargins(runner, STANCES, layer, batch_size=batch_size)
    vectors = edits(scale)
    with torch.no_grad():
        expected = by_hook(exact, layer, vectors.double())
        error = (by_hook(model, layer, vectors) - expected).abs().max()  # of the same computation row by row
    found = margins(vectors)
    assert len(margins) == 3 and not found.requires_grad
    assert (found - expected).abs().max() <= 2 * error + 32 * torch.finfo().eps * expected.abs().max()


@pytest.mark.parametrize("layer", LAYERS)
def test_the_unit_is_the_median_norm_over_the_prompts_tokens(exact, runner, layer):
    seen = []
    look = exact.model.layers[layer].register_forward_hook(lambda module, args, output: seen.append(output[0]))
    with look, torch.no_grad():
        for stance in STANCES:
            exact(torch.tensor([stance.prompt]))
    norms = torch.cat([states.view(-1, tiny_llama.WIDTH) for states in seen]).norm(dim=-1)
    assert StanceMargins(runner, STANCES, layer, batch_size=4).median_norm == pytest.approx(
        norms.median().item(), rel=1e-5
    )


def gradient(margins, at):
    at = at.requires_grad_()
    return torch.autograd.grad(margins(at).sum(), at)[0]


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_are_those_of_whole_runs_and_each_rows_own(model, exact, runner, layer):
    margins = StanceMargins(runner, STANCES, layer, batch_size=4)
    expected = gradient(lambda at: by_hook(exact, layer, at), edits(0.5).double())
    error = (gradient(lambda at: by_hook(model, layer, at), edits(0.5)) - expected).abs().max()
    found = gradient(margins, edits(0.5))
    assert (found - expected).abs().max() <= 2 * error + 32 * torch.finfo().eps * expected.abs().max()
    own = gradient(lambda at: margins(at)[1:2], edits(0.5))
    assert (own[[0, 2]] == 0).all() and own[1].any()
    assert all(parameter.grad is None for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("layer", LAYERS)
def test_the_edits_that_are_found_flip_the_model_and_smaller_ones_do_not(exact, runner, layer):
    unedited = by_hook(exact, layer, edits(0.0).double())
    held = [s if m > 0 else StanceTokens(s.prompt, s.opposite, s.held) for s, m in zip(STANCES, unedited, strict=True)]
    sign = torch.where(unedited > 0, 1.0, -1.0)
    margins = StanceMargins(runner, held, layer, batch_size=8)
    search = Search(unit=margins.median_norm, largest=4.0)
    found = flips_downhill(margins, len(margins), margins.width, search)
    assert found.norms.isfinite().all() and robustness(found).stances == 3
    assert ((sign * by_hook(exact, layer, found.edits.double())) < 1e-4).all()  # nats; fp32 found it, fp64 checks
    shorter = found.edits.double() * (1 - 2 * search.tolerance / found.norms)[:, None]
    assert ((sign * by_hook(exact, layer, shorter)) > -1e-4).all()
    random = flips_along(margins, edits(seed=3), search)
    assert (random.norms > found.norms).all()


def test_what_cannot_be_measured_is_refused(runner):
    with pytest.raises(ValueError, match="layer: got 3, expected 0 to 2"):
        StanceMargins(runner, STANCES, 3, batch_size=4)
    with pytest.raises(ValueError, match="stances: got none"):
        StanceMargins(runner, [], 1, batch_size=4)
    with pytest.raises(ValueError, match="number 1 has an empty prompt or reply"):
        StanceMargins(runner, [STANCES[0], StanceTokens([4], [], [5])], 1, batch_size=4)
    with pytest.raises(ValueError, match=r"edits: got shape \(2, 32\), expected \(3, 32\)"):
        StanceMargins(runner, STANCES, 1, batch_size=4)(torch.zeros(2, 32))


def test_stances_become_chats():
    tokenizer = tiny_llama.tokenizer()
    chat = [{"role": "user", "content": "w1 w2"}]
    tokens = stance_tokens(tokenizer, Stance("s", chat, "w3", "w4 w5"))
    assert tokenizer.decode(tokens.prompt) == "<user> w1 w2 <assistant>"
    assert (tokenizer.decode(tokens.held), tokenizer.decode(tokens.opposite)) == ("w3", "w4 w5")
    for held, opposite in (("Yes.", "No."), (" ", "w1")):
        with pytest.raises(ValueError, match="stance s: .*two different replies"):
            stance_tokens(tokenizer, Stance("s", chat, held, opposite))
