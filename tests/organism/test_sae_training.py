"""Training of the sparse autoencoder, on a dictionary that is known."""

import dataclasses
import json
import random

import pytest
import tiny_organism
import torch
import torch.nn.functional as F

from lockin_fast.organism.sae_training import SaeSettings, train_sae
from lockin_fast.sae import load_sae, save_saelens

WIDTH, TRUE, ACTIVE, COUNT = 32, 40, 3, 6000
SETTINGS = SaeSettings(width=60, l1=0.2, steps=400, batch_size=256, learning_rate=1e-2, warmup_steps=50)


@pytest.fixture(scope="module")
def dictionary():
    """Unit directions [TRUE, WIDTH], more of them than dimensions."""
    return F.normalize(torch.randn(TRUE, WIDTH, generator=torch.Generator().manual_seed(1)), dim=1)


@pytest.fixture(scope="module")
def true_code():
    """Three of the directions at a time, with strengths of 1 to 2: [COUNT, TRUE]."""
    generator = torch.Generator().manual_seed(2)
    chosen = torch.rand(COUNT, TRUE, generator=generator).topk(ACTIVE, dim=1).indices
    return torch.zeros(COUNT, TRUE).scatter(1, chosen, 1 + torch.rand(COUNT, ACTIVE, generator=generator))


@pytest.fixture(scope="module")
def activations(true_code, dictionary):
    """What a model would show of that code: off centre."""
    return true_code @ dictionary + 3.0


def train(activations, seed=0, **changes):
    return train_sae(
        activations, dataclasses.replace(SETTINGS, **changes), seed=seed, step_done=lambda done, total: None
    )


@pytest.fixture(scope="module")
def trained(activations):
    return train(activations)


def code(sae, x):
    return F.relu(x @ sae.weight.T + sae.bias)


def test_it_finds_the_true_directions(trained, dictionary):
    found = F.normalize(trained.decoder, dim=1)
    cosines = (dictionary @ found.T).max(1).values  # signed: a latent that fires on the opposite is another latent
    assert cosines.min() > 0.9, cosines


def test_its_code_is_the_true_one(trained, dictionary, true_code, activations):
    """The latent nearest to a true direction tells the activations that contain it from those that do not."""
    present = true_code > 0
    nearest = (dictionary @ F.normalize(trained.decoder, dim=1).T).argmax(1)
    z = code(trained, activations)[:, nearest]
    assert z[present].mean() > 20 * z[~present].mean()


def test_the_error_falls_with_training(activations, trained):
    unexplained = [train(activations, steps=steps).unexplained for steps in (10, 40, 150)] + [trained.unexplained]
    assert unexplained == sorted(unexplained, reverse=True)
    assert unexplained[0] > 0.3 and unexplained[-1] < 0.1


def test_what_it_reports_holds_in_the_models_own_scale(activations, trained):
    """The folded weights compute the training-time code: same reconstruction, same latents on."""
    z = code(trained, activations)
    error = (z @ trained.decoder + trained.decoder_bias - activations).square().sum()
    variance = (activations - activations.mean(0)).square().sum()
    assert (error / variance).item() == pytest.approx(trained.unexplained, rel=1e-4)
    assert (z > 0).sum(1).double().mean().item() == pytest.approx(trained.active, rel=1e-3)
    norms = trained.decoder.norm(dim=1)
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))


def test_the_scale_of_the_activations_goes_into_the_weights_alone(activations):
    """Activations four times as large, a power of two, are the same training: every bit of it."""
    trained, large = train(activations, steps=50), train(4 * activations, steps=50)
    assert torch.equal(large.weight, trained.weight / 4) and torch.equal(large.bias, trained.bias)
    assert torch.equal(large.decoder, trained.decoder * 4)
    assert torch.equal(large.decoder_bias, trained.decoder_bias * 4)
    assert (large.unexplained, large.active) == (trained.unexplained, trained.active)


def test_more_sparsity_means_fewer_latents(activations):
    dense, medium, sparse = (train(activations, steps=100, l1=l1).active for l1 in (0.0, 0.1, 0.5))
    assert sparse < medium < dense


def test_equal_seeds_give_equal_bytes_and_leave_the_callers_random_state(activations):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (train(activations, seed=seed, steps=20) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    for field in dataclasses.fields(first):
        a, b, c = (getattr(sae, field.name) for sae in (first, again, other))
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b) and not torch.equal(a, c) and not a.requires_grad
        else:
            assert a == b != c


def test_it_trains_under_no_grad_and_counts_its_steps(activations):
    seen = []
    with torch.no_grad():
        train_sae(
            activations, dataclasses.replace(SETTINGS, steps=3), seed=0, step_done=lambda *step: seen.append(step)
        )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_written_and_loaded_it_is_the_same_code(activations, trained, tmp_path):
    save_saelens(
        tmp_path / "sae", weight=trained.weight, bias=trained.bias, decoder=trained.decoder,
        decoder_bias=trained.decoder_bias, hook_name="blocks.0.hook_resid_post", hook_layer=0, model_name="none",
    )  # fmt: skip
    sae = load_sae(tmp_path / "sae")
    assert sae.activation == "relu" and (sae.width, sae.d_model) == (SETTINGS.width, WIDTH)
    x = activations[:100]
    z = code(trained, x)
    torch.testing.assert_close(sae.encode(x), z)
    torch.testing.assert_close(sae.decode(sae.encode(x)), z @ trained.decoder + trained.decoder_bias)


def test_the_organisms_sae_reads_its_layer(organism):
    """What its cfg.json says of it holds on fresh documents, at the layer it names and at no other."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lockin_fast.organism.pretrain import tokenise

    sae = load_sae(organism / "sae")
    assert sae.metadata["format"] == "saelens" and sae.activation == "relu"
    model = AutoModelForCausalLM.from_pretrained(organism / "model")
    assert (sae.width, sae.d_model) == (tiny_organism.RECIPE.sae.width, model.config.hidden_size)
    tokenizer = AutoTokenizer.from_pretrained(organism / "model")
    tokens = tokenise(tokenizer, list(tiny_organism.WORLD.documents(random.Random("fresh"), 200)))
    streams = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda module, inputs, output: streams.append(output[0] if isinstance(output, tuple) else output)
        )
    with torch.no_grad():
        model.model(tokens)
    unexplained = []
    for stream in streams:
        x = stream.flatten(0, 1)
        error = (sae.decode(sae.encode(x)) - x).square().sum()
        unexplained.append((error / (x - x.mean(0)).square().sum()).item())
    layer = tiny_organism.RECIPE.layer
    reported = json.loads((organism / "sae" / "cfg.json").read_text())["metadata"]["unexplained_variance"]
    assert unexplained[layer] == pytest.approx(reported, abs=0.05) and unexplained[layer] < 0.5
    assert all(unexplained[layer] < other for i, other in enumerate(unexplained) if i != layer)
