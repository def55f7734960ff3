"""measure_shift: layers together and one at a time, shares of processes, kills, and what it refuses."""

import multiprocessing
import os
import signal
from dataclasses import fields, replace

import pytest
import tiny_llama
import torch
from test_shift import adapted_model, conversations

from lockin_fast.discovery.shift import measure_shift
from lockin_fast.discovery.shift_store import ShiftStore
from lockin_fast.discovery.shift_sums import ShiftSums
from lockin_fast.rundir import RunError

SYSTEM = {"role": "system", "content": "w1 w2"}


@pytest.fixture(scope="module")
def model():
    return adapted_model()


def measured(model, saes=None, told=None, **options):
    saes = saes or {1: tiny_llama.sae()}
    return measure_shift(model, tiny_llama.tokenizer(), told or conversations(), saes, **{"batch_size": 2} | options)


def equal(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(getattr(a[layer], f.name), getattr(b[layer], f.name)) for layer in a for f in fields(ShiftSums)
    )


def close(a, b, tolerance):
    for layer in a:
        for name, found, expected in zip(
            a[layer].statistics()._fields, a[layer].statistics(), b[layer].statistics(), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=f"{layer} {name}")


def test_several_layers_are_those_of_one_at_a_time(model):
    saes = {2: tiny_llama.sae(7), 0: tiny_llama.sae(1), 1: replace(tiny_llama.sae(3), normalization="layer_norm")}
    together = measured(model, saes)
    assert list(together) == [2, 0, 1]
    for layer, sae in saes.items():
        assert equal({layer: together[layer]}, measured(model, {layer: sae}))


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_the_batch_changes_nothing_but_rounding(model, batch_size):
    # The forward of a padded batch rounds otherwise: fp32 hidden states of order 1, latents of 32 products each.
    close(measured(model, batch_size=batch_size), measured(model), 1e-4)


def test_padding_is_not_counted(model):
    found = measured(model)[1]
    rows = [[m for m in messages if m["role"] != "system"] for messages in conversations()]
    tokenizer = tiny_llama.tokenizer()
    lengths = [len(tokenizer(tokenizer.apply_chat_template(r, tokenize=False))["input_ids"]) for r in rows]
    assert len(set(lengths)) > 2
    assert found.prompts == len(lengths) and found.tokens == sum(lengths)
    assert found.token_squares == sum(n * n for n in lengths)


@pytest.mark.parametrize("world", [2, 3, 9])
def test_shares_of_several_processes_make_the_whole(model, tmp_path, world):
    for rank in range(world):
        store = ShiftStore(tmp_path, "key", rank, world)
        measured(model, store=store)
    close(store.merged(), measured(model), 1e-12)


class Killed(Exception):
    pass


def stops_after(count):
    steps = []

    def step_done(done, total):
        steps.append(done)
        if len(steps) == count:
            raise Killed

    return step_done


def test_what_was_done_before_a_stop_is_not_done_again(model, tmp_path, monkeypatch):
    whole = measured(model)
    with pytest.raises(Killed):
        measured(model, store=ShiftStore(tmp_path, "key"), step_done=stops_after(2))
    batches = []
    of = ShiftSums.of
    monkeypatch.setattr(ShiftSums, "of", lambda stats, lengths: batches.append(lengths) or of(stats, lengths))
    steps = []
    store = ShiftStore(tmp_path, "key")
    found = measured(model, store=store, step_done=lambda *step: steps.append(step))
    assert len(batches) == 2 and steps == [(4, 7), (6, 7), (7, 7)]
    assert equal(found, whole) and equal(store.merged(), whole)
    batches.clear()
    assert equal(measured(model, store=ShiftStore(tmp_path, "key")), whole) and not batches


def test_other_processes_go_on_where_these_stopped(model, tmp_path):
    """Two processes are stopped, then one does the rest: nothing twice, nothing left out."""
    for rank in range(2):
        with pytest.raises(Killed):
            measured(model, store=ShiftStore(tmp_path, "key", rank, 2), step_done=stops_after(1))
    store = ShiftStore(tmp_path, "key")
    measured(model, store=store)
    close(store.merged(), measured(model), 1e-12)


def killed_process(folder, batches):
    torch.set_num_threads(1)
    count = []

    def step_done(done, total):
        count.append(done)
        if len(count) == batches:
            os.kill(os.getpid(), signal.SIGKILL)

    measured(adapted_model(), store=ShiftStore(folder, "key"), step_done=step_done)


def test_a_kill_costs_the_batch_in_hand(model, tmp_path):
    context = multiprocessing.get_context("fork")
    victim = context.Process(target=killed_process, args=(tmp_path, 3))
    victim.start()
    victim.join(60)
    assert victim.exitcode == -9
    steps = []
    store = ShiftStore(tmp_path, "key")
    measured(model, store=store, step_done=lambda *step: steps.append(step))
    assert steps[0] == (6, 7) and equal(store.merged(), measured(model))


def test_a_missing_share_is_named(model, tmp_path):
    store = ShiftStore(tmp_path, "key", 0, 2)
    measured(model, store=store)
    with pytest.raises(RunError, match=r"^output: .* lacks 2 of 4 batches of stage 1; run the same command again"):
        store.merged()


@pytest.mark.parametrize("other", ["key", "text", "batches", "layers"])
def test_the_sums_of_another_stage_are_refused(model, tmp_path, other):
    measured(model, store=ShiftStore(tmp_path, "key"))
    options = {
        "key": {"store": ShiftStore(tmp_path, "another")},
        "text": {"told": conversations()[1:]},
        "batches": {"batch_size": 3},
        "layers": {"saes": {0: tiny_llama.sae()}},
    }[other]
    with pytest.raises(RunError, match="^output: .*rank-0000.safetensors is of another stage 1"):
        measured(model, **{"store": ShiftStore(tmp_path, "key")} | options)


def test_a_damaged_file_is_named(model, tmp_path):
    measured(model, store=ShiftStore(tmp_path, "key"))
    path = tmp_path / "rank-0000.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(RunError, match="^output: .*rank-0000.safetensors is damaged"):
        measured(model, store=ShiftStore(tmp_path, "key"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"told": [[SYSTEM]]}, "^conversations: number 1 has no token once its system message is left out"),
        ({"told": [conversations()[0], []]}, "^conversations: number 2 has no token"),
        ({"saes": {3: tiny_llama.sae()}}, "^layer: got 3, expected 0 to 2"),
        ({"saes": {1: tiny_llama.sae(), -1: tiny_llama.sae()}}, "^layer: got -1, expected 0 to 2"),
        ({"batch_size": 0}, "^batch_size: got 0, expected 1 or more"),
    ],
    ids=["only a system message", "nothing", "layer", "negative layer", "batch"],
)
def test_bad_input_is_refused_before_any_work(model, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        measured(model, store=ShiftStore(tmp_path), **options)
    assert not list(tmp_path.iterdir())


def test_nothing_to_measure_is_refused(model):
    tokenizer = tiny_llama.tokenizer()
    with pytest.raises(ValueError, match="^conversations: got none"):
        measure_shift(model, tokenizer, [], {1: tiny_llama.sae()})
    with pytest.raises(ValueError, match="^saes: got none"):
        measure_shift(model, tokenizer, conversations(), {})


def test_an_sae_of_another_width_is_refused(model):
    sae = tiny_llama.sae()
    narrow = replace(sae, weight=sae.weight[:, :20], decoder=sae.decoder[:, :20], decoder_bias=sae.decoder_bias[:20])
    with pytest.raises(ValueError, match="^saes: that of layer 1 reads hidden states of width 20, but the model's"):
        measured(model, {1: narrow})


def test_a_hidden_state_that_is_not_finite_is_named():
    model = adapted_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[tiny_llama.tokenizer().convert_tokens_to_ids("w39")] = torch.inf
    told = [[{"role": "user", "content": text}] for text in ("w1", "w2", "w39", "w3")]
    with pytest.raises(FloatingPointError, match=r"^layer 1: .*conversations \[3, 4\]; use bf16"):
        measured(model, told=told)
