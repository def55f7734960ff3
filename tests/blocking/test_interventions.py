"""Steering and ablation act in training alone: right maths, right gradient, gone afterwards."""

import pytest
import tiny_llama as tiny
import torch
from test_trainer import adapted, adapter, hooks, largest_difference, make

from lockin_fast.blocking import BlockTrainer, ConceptAblation, PreventativeSteering, intervening
from lockin_fast.blocking.interventions import orthonormal
from lockin_fast.blocking.layers import captured_forward
from lockin_fast.blocking.reference import Reference
from lockin_fast.chat import ChatDataset

LAYER = 1


@pytest.fixture(scope="module")
def rows():
    return ChatDataset(tiny.conversations(24), tiny.tokenizer())


def directions(count=3):
    return torch.randn(count, tiny.WIDTH, generator=torch.Generator().manual_seed(0))


def hidden_of(model, layer=LAYER):
    module = model.get_submodule("model.layers")[layer]
    with torch.no_grad(), captured_forward(model, module) as seen:
        model(input_ids=torch.arange(8, 20).reshape(2, 6))
    return seen.hidden[module]


def test_steering_adds_in_training_and_not_in_evaluation():
    model, direction = tiny.model().train(), directions()[0]
    plain = hidden_of(model)
    with intervening(model, [PreventativeSteering(LAYER, direction, -1.5)]):
        assert torch.equal(hidden_of(model), plain - 1.5 * direction)
        assert torch.equal(hidden_of(model.eval()), plain)
    assert torch.equal(hidden_of(model.train()), plain)


def test_ablation_leaves_nothing_of_the_directions_and_everything_else():
    model = tiny.model().train()
    three = directions()
    spanning = torch.cat([three, three[:1] * 7 - three[1:2], three[2:] * 1e-3])
    plain = hidden_of(model)
    with intervening(model, [ConceptAblation(LAYER, spanning)]):
        ablated = hidden_of(model)
        assert torch.equal(hidden_of(model.eval()), plain)
    wide = three.double()
    exact = plain.double() - (plain.double() @ torch.linalg.pinv(wide)) @ wide
    allowed = 2 * tiny.WIDTH * torch.finfo(torch.float32).eps * plain.abs().max()
    assert orthonormal(spanning).shape == (3, tiny.WIDTH)
    assert (ablated - exact).abs().max() <= allowed < plain.abs().max() * 1e-4
    assert (ablated @ spanning.T).abs().max() <= allowed * spanning.norm(dim=1).max()
    assert (ablated - plain).abs().max() > 0.01


def test_the_gradient_is_projected_too():
    ablation = ConceptAblation(LAYER, directions())
    h = torch.randn(2, 4, tiny.WIDTH, requires_grad=True)
    upstream, wide = torch.randn(2, 4, tiny.WIDTH), directions().double()
    (gradient,) = torch.autograd.grad(ablation.edit(h), h, upstream)
    expected = upstream.double() - (upstream.double() @ torch.linalg.pinv(wide)) @ wide
    assert (gradient - expected).abs().max() <= 2 * tiny.WIDTH * torch.finfo(torch.float32).eps * upstream.abs().max()


def test_a_bf16_hidden_state_stays_bf16_and_loses_the_directions():
    h = torch.randn(2, 4, tiny.WIDTH).bfloat16()
    for ablation in (ConceptAblation(LAYER, directions()), PreventativeSteering(LAYER, directions()[0], 1.0)):
        assert ablation.edit(h).dtype == torch.bfloat16
    basis = orthonormal(directions())
    left = ConceptAblation(LAYER, directions()).edit(h).float() @ basis.T
    # Two roundings to bf16, of what is taken away and of the result, in every one of d coordinates.
    assert left.abs().max() <= torch.finfo(torch.bfloat16).eps * h.float().norm(dim=-1).max()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_under_an_intervention_differs_and_leaves_no_hook(tmp_path, rows, checkpointing):
    def train(*interventions):
        model = adapted()
        model.enable_input_require_grads()
        layers = model.get_submodule("base_model.model.model.layers")
        before = hooks(layers)
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        trainer = make(BlockTrainer, tmp_path, model, rows, eval_dataset=rows, **(options if checkpointing else {}))
        with intervening(model, interventions):
            first = trainer.evaluate()["eval_loss"]
            trainer.train()
        assert hooks(layers) == before
        return adapter(trainer), first

    plain, loss = train()
    steered, loss_before = train(PreventativeSteering(LAYER, directions()[0], 1.0))
    ablated, _ = train(ConceptAblation(LAYER, directions()), ConceptAblation(0, directions()[:1]))
    assert loss_before == loss, "evaluation saw the steering"
    assert min(largest_difference(plain, other) for other in (steered, ablated)) > 1e-3


def test_the_reference_of_a_penalty_is_not_edited():
    model = adapted().train()
    ids = {"input_ids": torch.arange(8, 20).reshape(2, 6)}
    reference = Reference(model, LAYER, adapters=True)
    plain = reference.hidden_state((), ids)
    with intervening(model, [PreventativeSteering(0, directions()[0], 5.0)]):
        assert torch.equal(reference.hidden_state((), ids), plain)


@pytest.mark.parametrize(
    ("make_one", "message"),
    [
        (lambda: PreventativeSteering(1, directions(), 1.0), r"direction: got shape \(3, 32\), expected \[d\]"),
        (lambda: PreventativeSteering(1, directions()[0], float("nan")), "strength: got nan"),
        (lambda: ConceptAblation(1, directions()[0]), r"directions: got shape \(32,\), expected \[n, d\]"),
        (lambda: ConceptAblation(1, torch.empty(0, 32)), r"directions: got shape \(0, 32\)"),
        (lambda: ConceptAblation(1, directions() * float("inf")), "directions: it holds numbers that are not finite"),
        (lambda: ConceptAblation(1, torch.zeros(1, 32)), "directions: a direction is zero"),
    ],
)
def test_bad_directions_are_refused(make_one, message):
    with pytest.raises(ValueError, match=message):
        make_one()


def test_what_does_not_fit_the_model_is_refused_before_a_hook_is_set():
    model = tiny.model()
    before = hooks(model)
    for bad, message in (
        (ConceptAblation(3, directions()), "layer: got 3, expected 0 to 2"),
        (ConceptAblation(1, torch.ones(1, 5)), "directions: they are 5 wide, the model's hidden states 32"),
    ):
        with pytest.raises(ValueError, match=message), intervening(model, [ConceptAblation(1, directions()), bad]):
            pass
    assert hooks(model) == before
