"""torch.compile: the hook is traced with the model, the penalty is the eager one, and 16-bit rounding is warned of."""

import warnings

import pytest
import tiny_llama as tiny
import torch
from test_trainer import adapted, adapter, history, largest_difference, make, rounding, rows  # noqa: F401
from test_trainer_tap import untapped

from lockin_fast.blocking import BlockTrainer
from lockin_fast.blocking.reference import Reference


def train(folder, rows, model, **options):  # noqa: F811
    trainer = make(
        BlockTrainer, folder, model, rows, penalty=tiny.penalty(500.0), optim="sgd", learning_rate=0.1, max_steps=6,
        **options,
    )  # fmt: skip
    before = adapter(trainer)
    trainer.train()
    trained = {name.replace("_orig_mod.", ""): value for name, value in adapter(trainer).items()}
    return trained, largest_difference(before, adapter(trainer)), history(trainer, "block_penalty")


@pytest.mark.slow  # tracing takes a quarter of a minute
@pytest.mark.parametrize(
    ("how", "backend"), [("trainer", "aot_eager"), ("trainer", "inductor"), ("module", "eager"), ("wrapped", "eager")]
)
def test_a_compiled_model_trains_the_same_adapter(tmp_path, rows, how, backend):  # noqa: F811
    torch._dynamo.reset()
    expected, moved, penalty = train(tmp_path, rows, adapted(random_b=True))
    model, options, before = adapted(random_b=True), {}, untapped("the model is compiled")
    if how == "trainer":
        options = {"torch_compile": True, "torch_compile_backend": backend}
    elif how == "module":
        model.compile(backend=backend)
    else:
        model, options = torch.compile(model, backend=backend), {"remove_unused_columns": False}
    compiled, _, compiled_penalty = train(tmp_path, rows, model, **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert untapped("the model is compiled") > before
    assert compiled_penalty == pytest.approx(penalty, rel=rounding(rows)) and penalty[0] > 0
    assert largest_difference(compiled, expected) <= rounding(rows) * moved
    torch._dynamo.reset()


def test_a_reference_that_rounds_otherwise_is_warned_of_once():
    ids = torch.arange(8, 14)[None]
    for dtype, autocast, warned in (
        (torch.float32, False, False),
        (torch.float32, True, True),
        (torch.bfloat16, False, True),
    ):
        compiled = torch.compile(adapted(dtype=dtype), backend="eager")
        reference = Reference(compiled, 1, adapters=True)
        for _ in range(2):
            with warnings.catch_warnings(record=True) as caught, torch.autocast("cpu", torch.bfloat16, autocast):
                warnings.simplefilter("always")
                reference.hidden_state((), {"input_ids": ids})
            said = [str(w.message) for w in caught if "rounds its 16-bit values in other places" in str(w.message)]
            assert len(said) == warned
            warned = False
    assert not Reference(adapted(dtype=torch.bfloat16), 1, adapters=True)._unlike_compiled
