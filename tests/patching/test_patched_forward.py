"""Runs from any layer on: equal to whole runs with hooks, row by row, for every family and component."""

from contextlib import nullcontext

import pytest
import tiny_families
import torch
import transformers
from tiny_families import FAMILIES, LAYERS, PROMPTS, REPLIES

from lockin_fast.patching.components import COMPONENTS
from lockin_fast.patching.forward import Edit, Runner
from lockin_fast.patching.tokens import following, left_padded


@pytest.fixture(scope="module", params=FAMILIES)
def runner(request):
    return Runner(tiny_families.model(request.param))


@pytest.fixture
def assert_close(runner):
    return tiny_families.fp32_close(runner.model)


def every_column(tokens):
    return torch.ones_like(tokens.input_ids).nonzero()


def test_a_padded_batch_gives_what_each_row_gives_alone(runner, assert_close):
    tokens = left_padded(PROMPTS, "cpu")
    watch = ("residual", "heads", "attention", "mlp")
    found = runner.run(tokens, watch=watch, logits_at=every_column(tokens))
    logits = found.logits.view(*tokens.input_ids.shape, -1)
    for row, ids in enumerate(PROMPTS):
        expected, states = tiny_families.states(runner.model, ids)
        assert_close(logits[row, -len(ids) :], expected)
        for (component, layer), state in states.items():
            assert_close(found.watched[component][layer][row, -len(ids) :], state)


@pytest.mark.parametrize("start", range(1, LAYERS + 1))
def test_from_a_layer_on_with_its_own_states_it_is_the_whole_run_bit_by_bit(runner, start):
    tokens = left_padded(PROMPTS, "cpu")
    at = every_column(tokens)
    whole = runner.run(tokens, watch=("residual",), logits_at=at)
    upper = runner.run(tokens, start=start, hidden=whole.residual[start - 1], watch=("residual",), logits_at=at)
    assert torch.equal(upper.logits, whole.logits) and sorted(upper.residual) == list(range(start, LAYERS))
    assert all(torch.equal(upper.residual[n], whole.residual[n]) for n in upper.residual)


@pytest.mark.parametrize("component", COMPONENTS)
def test_edits_are_those_of_a_whole_run_with_hooks(runner, assert_close, component):
    tokens, layer = left_padded(PROMPTS, "cpu"), 1
    generator = torch.Generator().manual_seed(3)
    below = runner.run(tokens, watch=("residual",)).residual[layer - 1]
    patched = {0: [1, 4], 2: [0, 5]}  # positions by row, the second row stays as it is
    length = tokens.input_ids.shape[1]
    positions = torch.tensor([[row, length - len(PROMPTS[row]) + t] for row, ts in patched.items() for t in ts])
    heads = torch.tensor([0, 3, 1, 1]) if component == "heads" else None
    source = torch.randn(4, 8 if component == "heads" else 32, generator=generator)
    edits = [Edit(layer, component, positions, source, heads)]
    at = every_column(tokens)
    for options in ({}, {"start": layer, "hidden": below}):
        found = runner.run(tokens, edits=edits, logits_at=at, **options).logits.view(3, length, -1)
        for row, ids in enumerate(PROMPTS):

            def edit(value, row=row):
                value = value.clone()
                for n, (r, column) in enumerate(positions.tolist()):
                    if r == row:
                        place = column - length + len(PROMPTS[row])
                        value[(place,) if heads is None else (place, heads[n])] = source[n]
                return value

            expected, _ = tiny_families.states(runner.model, ids, [(component, layer, edit)])
            assert_close(found[row, -len(ids) :], expected)


def test_what_follows_reads_the_keys_and_values_of_what_was_read(runner, assert_close):
    prompts = left_padded(PROMPTS, "cpu")
    replies = following(prompts, REPLIES[0])
    read = runner.run(prompts, watch=("keys_values",))
    kept = {n: (k.clone(), v.clone()) for n, (k, v) in read.keys_values.items()}
    watch = ("residual", "keys_values")
    found = runner.run(replies, past=read.keys_values, watch=watch, logits_at=every_column(replies))
    logits = found.logits.view(*replies.input_ids.shape, -1)
    for row, (prompt, reply) in enumerate(zip(PROMPTS, REPLIES[0], strict=True)):
        expected, states = tiny_families.states(runner.model, prompt + reply)
        assert_close(logits[row, : len(reply)], expected[len(prompt) :])
        for layer in range(LAYERS):
            here = found.residual[layer][row, : len(reply)]
            assert_close(here, states["residual", layer][len(prompt) :])
    for n, (keys, values) in read.keys_values.items():
        assert torch.equal(keys, kept[n][0]) and torch.equal(values, kept[n][1])
        assert found.keys_values[n][0].shape[2] == prompts.input_ids.shape[1] + replies.input_ids.shape[1]


def test_the_model_is_as_it_was_afterwards(runner):
    tokens = left_padded(PROMPTS, "cpu")
    hidden = torch.zeros(*tokens.input_ids.shape, 32)
    for column in (0, 99):
        edits = [Edit(1, "mlp", torch.tensor([[0, column]]), torch.zeros(1, 32))]
        with nullcontext() if column == 0 else pytest.raises(ValueError, match="positions"):
            runner.run(tokens, start=1, hidden=hidden, edits=edits, watch=("heads",), logits_at=every_column(tokens))
    for module in runner.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert "forward" not in module.__dict__


def test_what_does_not_fit_is_said_before_any_work(monkeypatch):  # a layer that runs fails otherwise
    runner = Runner(tiny_families.model("Llama"))
    tokens = left_padded(PROMPTS, "cpu")
    hidden, at = torch.zeros(*tokens.input_ids.shape, 32), torch.tensor([[0, 0]])
    read = runner.run(tokens, watch=("keys_values",)).keys_values
    monkeypatch.setattr(runner.layers[0], "forward", None)
    edit = Edit(0, "residual", at, torch.zeros(1, 32))
    for options, message in (
        ({"start": 4, "hidden": hidden}, "start: got 4, expected 0 to 3"),
        ({"start": 1}, "hidden: got None for start=1"),
        ({"hidden": hidden}, "hidden: got one for start=0"),
        ({"start": 1, "hidden": hidden[:, 1:]}, r"hidden: got shape \(3, 6, 32\), expected \(3, 7, 32\)"),
        ({"past": read}, "past: got some for tokens that follow 0"),
        ({"start": 1, "hidden": hidden, "edits": [edit]}, "edits: got one at layer 0, but layers 1 to 2 run"),
    ):
        with pytest.raises(ValueError, match=message):
            runner.run(tokens, **options)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda: tiny_families.model("Llama").train(), "training mode"),
        (lambda: compiled(tiny_families.model("Llama")), "compiled"),
        (lambda: mamba(), "MambaForCausalLM cannot be run in part"),
        (lambda: sharing_keys(), "Gemma3nForCausalLM cannot be run in part"),
        (lambda: handing_on(tiny_families.model("Llama")), "hand each other more than the hidden state"),
    ],
)
def test_models_that_cannot_be_run_in_part_are_refused(broken, message):
    with pytest.raises(ValueError, match=f"^model: .*{message}"):
        Runner(broken())


def mamba():
    """A model that reads its past from a state and has no keys and values."""
    config = transformers.MambaConfig(vocab_size=48, hidden_size=32, num_hidden_layers=2, state_size=4)
    return transformers.MambaForCausalLM(config).eval()


def sharing_keys():
    """A model whose upper layers read the keys and values of lower ones."""
    config = transformers.Gemma3nTextConfig(
        vocab_size=48, vocab_size_per_layer_input=48, hidden_size=32, hidden_size_per_layer_input=8,
        intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2, laurel_rank=4,
        altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4,
    )  # fmt: skip
    return transformers.Gemma3nForCausalLM(config).eval()


def compiled(model):
    """The model with a layer compiled in place, as far as can be seen from outside."""
    model.model.layers[1]._compiled_call_impl = model.model.layers[1].__call__
    return model


def handing_on(model):
    """The model with a second thing that its layers pass on, as some architectures share keys between layers."""
    memory = {}
    first, second = model.model.layers[0], model.model.layers[2]
    plain_first, plain_second = first.mlp.forward, second.mlp.forward
    first.mlp.forward = lambda x: memory.setdefault("kept", plain_first(x)) if memory.clear() is None else None
    second.mlp.forward = lambda x: plain_second(x) + memory.pop("kept", 0)
    return model
