"""In the trainer the penalty's gradient is added to the one that arrives, in place, and changes nothing else."""

import pytest
import tiny_llama as tiny
import torch
import transformers
from packaging.version import Version
from test_trainer import adapted, adapter, history, largest_difference, make, rounding, rows  # noqa: F401

from lockin_fast import backends
from lockin_fast.blocking import BlockTrainer, layers
from lockin_fast.ops import block_penalty, gradient_tap

MODES = {
    "whole batch": {},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "autocast": {"bf16": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "not reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "clipped": {"max_grad_norm": 1e-3},
}
QUICK = ("accumulated", "autocast", "reentrant")


def untapped(cause="reentrant activation checkpointing has no graph to tap"):
    """How often the gradient was a tensor of its own, as `backends()` counts it."""
    (row,) = (row for row in backends() if (row.op, row.device) == ("latent_backward_", "cpu"))
    return row.fallbacks.get(f"not added to the gradient that arrives: {cause}", 0)


@pytest.mark.parametrize("mode", [pytest.param(m, marks=() if m in QUICK else pytest.mark.slow) for m in MODES])
def test_the_tap_serves_and_trains_the_same_adapter(tmp_path, rows, monkeypatch, mode):  # noqa: F811
    added, made = [], []
    steps = 3 * MODES[mode].get("gradient_accumulation_steps", 1)
    # Before 5.22 transformers ran hooks inside the checkpoint, where the reentrant mode has no graph to tap.
    untappable = mode == "reentrant" and Version(transformers.__version__) < Version("5.22")
    add, gradient = gradient_tap.latent_backward_, block_penalty.latent_backward
    monkeypatch.setattr(gradient_tap, "latent_backward_", lambda *args: added.append(1) or add(*args))
    monkeypatch.setattr(block_penalty, "latent_backward", lambda *args: made.append(1) or gradient(*args))

    def train(tapped):
        added.clear(), made.clear()
        fallen = untapped()
        model = adapted(random_b=True)
        model.enable_input_require_grads()
        with monkeypatch.context() as patch:
            if not tapped:
                patch.setattr(layers, "gradient_tap", lambda h: h)
            trainer = make(
                BlockTrainer, tmp_path, model, rows, penalty=tiny.penalty(500.0), optim="sgd", learning_rate=0.1,
                **MODES[mode],
            )  # fmt: skip
            before = adapter(trainer)
            trainer.train()
        moved = largest_difference(before, adapter(trainer))
        assert untapped() - fallen == (0 if tapped and not untappable else steps)
        return adapter(trainer), moved, history(trainer, "block_penalty"), (len(added), len(made))

    (plain, moved, plain_penalty, counts), (tapped, _, penalty, tapped_counts) = train(False), train(True)
    assert counts == (0, steps) and tapped_counts == (counts if untappable else (steps, 0))
    # Under autocast a last bit of the sum may flip a bf16 rounding, in each of 3 steps and 2 layers below the tap.
    allowed = 3 * 2 * torch.finfo(torch.bfloat16).eps if mode == "autocast" else rounding(rows)
    assert largest_difference(plain, tapped) <= allowed * moved
    assert penalty == pytest.approx(plain_penalty, rel=allowed) and penalty[0] > 0
