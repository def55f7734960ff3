"""A loop of one's own: the injected gradient is that of the eager loss, under accumulation, autocast, recomputation."""

import pytest
import tiny_llama as tiny
import torch
from test_trainer import IGNORED, adapted, eager_loss, rounding, rows  # noqa: F401

from lockin_fast import GradientInjection
from lockin_fast.chat import PaddingCollator

COLLATE = PaddingCollator(0)


def targets(labels):
    return (labels[:, 1:] != IGNORED).sum()


def summed_loss(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loop(model, rows, penalty, micro, **options):  # noqa: F811
    """One optimiser step's gradients in micro-batches, and the sum of what they cost."""
    blocking = GradientInjection(model, penalty)
    total = targets(COLLATE([rows[i] for i in range(8)])["labels"])
    cost = 0.0
    for start in range(0, 8, micro):
        batch = COLLATE([rows[i] for i in range(start, start + micro)])
        with blocking(batch["labels"], normalizer=options.get("normalizer", total)):
            loss = summed_loss(model, batch) / total
        (loss * options.get("scale", 1.0)).backward()
        cost += blocking.last["block_penalty"].item()
    return gradients(model), cost


def assert_close(found, expected, allowed):
    assert found.keys() == expected.keys()
    for name, exact in expected.items():
        assert (found[name] - exact).abs().max() <= allowed * exact.abs().max(), name


@pytest.fixture(scope="module")
def eager(rows):  # noqa: F811
    """Gradients and block penalty of the eager loss."""
    model, penalty = adapted(random_b=True).train(), tiny.penalty(500.0)
    batch = COLLATE([rows[i] for i in range(8)])
    loss = eager_loss(model, batch, penalty)
    loss.backward()
    found = gradients(model)
    block = (loss - model(**batch).loss).item() / penalty.weight
    assert block * penalty.weight > 0.1, "the penalty is too small for these tests to see it"
    return found, block


@pytest.mark.parametrize("micro", [8, 4, 2])
def test_the_gradients_are_the_eager_ones_however_the_batch_is_split(rows, eager, micro):  # noqa: F811
    found, cost = loop(adapted(random_b=True).train(), rows, tiny.penalty(500.0), micro)
    assert_close(found, eager[0], rounding(rows))
    assert cost == pytest.approx(eager[1], rel=1e-4)


def test_a_scaled_loss_takes_a_scaled_normalizer(rows, eager):  # noqa: F811
    scale = 1024.0
    found, _ = loop(
        adapted(random_b=True).train(), rows, tiny.penalty(500.0), 8, scale=scale,
        normalizer=lambda labels: targets(labels) / scale,
    )  # fmt: skip
    assert_close({name: grad / scale for name, grad in found.items()}, eager[0], rounding(rows))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(rows, eager, reentrant):  # noqa: F811
    model = adapted(random_b=True).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found, _ = loop(model, rows, tiny.penalty(500.0), 4)
    assert_close(found, eager[0], rounding(rows))


@pytest.mark.parametrize("around", ["the context", "the forward"])
def test_the_reference_runs_in_the_forwards_autocast(rows, around):  # noqa: F811
    model = adapted().train()
    blocking = GradientInjection(model, tiny.penalty(500.0))
    batch = COLLATE([rows[i] for i in range(8)])
    outside, inside = (True, False) if around == "the context" else (False, True)
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        with blocking(batch["labels"], normalizer=targets):
            with torch.autocast("cpu", torch.bfloat16, enabled=outside or inside):
                summed_loss(model, batch)
    assert blocking.last["block_penalty"] == 0.0 == blocking.last["active_fraction"]


def test_arguments_given_by_position_are_the_same_arguments(rows):  # noqa: F811
    """Else the padding would be penalised too, and the reference would compute a loss."""
    batch, costs = COLLATE([rows[i] for i in range(8)]), []
    assert (batch["attention_mask"] == 0).any()
    for by_name in (True, False):
        model = adapted(random_b=True).train()
        blocking = GradientInjection(model, tiny.penalty(500.0, tokens="all"))
        with blocking(batch["labels"], normalizer=10.0):
            if by_name:
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            else:
                model(batch["input_ids"], batch["attention_mask"])
        costs.append({name: value.item() for name, value in blocking.last.items()})
    assert costs[0] == costs[1]


def test_a_weight_of_zero_measures_only(rows):  # noqa: F811
    model = adapted(random_b=True).train()
    batch = COLLATE([rows[i] for i in range(8)])
    summed_loss(model, batch).backward()
    plain = gradients(model)
    model.zero_grad()
    blocking = GradientInjection(model, tiny.penalty(0.0))
    with blocking(batch["labels"], normalizer=targets):
        loss = summed_loss(model, batch)
    loss.backward()
    assert blocking.last["block_penalty"] > 0
    assert all(torch.equal(grad, plain[name]) for name, grad in gradients(model).items())


def test_what_cannot_work_is_refused(rows):  # noqa: F811
    batch = COLLATE([rows[i] for i in range(2)])
    with pytest.raises(TypeError, match="penalty: got none"):
        GradientInjection(adapted(), None)
    with pytest.raises(ValueError, match="layer: got 9, expected 0 to 2"):
        GradientInjection(adapted(), tiny.penalty(layer=9))
    with pytest.raises(ValueError, match="DataParallel is not supported"):
        GradientInjection(torch.nn.DataParallel(adapted()), tiny.penalty())

    model = adapted().train()
    blocking = GradientInjection(model, tiny.penalty())
    with pytest.raises(ValueError, match="normalizer: got 0, expected a finite number above 0"):
        with blocking(batch["labels"], normalizer=0):
            pass
    with pytest.raises(RuntimeError, match="layer 1 of PeftModel was not seen in the forward"):
        with blocking(batch["labels"], normalizer=1):
            pass
    with pytest.raises(RuntimeError, match="the model ran 2 times in one context"):
        with blocking(batch["labels"], normalizer=1):
            summed_loss(model, batch), summed_loss(model, batch)
    with pytest.raises(RuntimeError, match="the output of layer 1 takes no gradient"):
        with blocking(batch["labels"], normalizer=1), torch.no_grad():
            summed_loss(model, batch)
    with pytest.raises(ValueError, match="labels: got shape"):
        with blocking(batch["labels"][:, 1:], normalizer=1):
            summed_loss(model, batch)
    with pytest.raises(KeyError, match="of the loop"):
        with blocking(batch["labels"], normalizer=1):
            raise KeyError("of the loop")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

