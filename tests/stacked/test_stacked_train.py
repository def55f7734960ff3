"""A stack against runs of its members alone: the same adapters, whatever sets them apart, and no word between them."""

from dataclasses import replace

import pytest
import tiny_llama as tiny
import torch
from peft import PeftModel
from runs import LORA, MEMBERS, PROMISED, SETTINGS, difference, exported, single, stacked

from lockin_fast.blocking import BlockPenalty
from lockin_fast.chat import ChatDataset
from lockin_fast.lora import adapter, save_adapter
from lockin_fast.sae import SparseAutoencoder
from lockin_fast.stacked import AdapterStack, Member
from lockin_fast.stacked.stack import exporting


@pytest.fixture(scope="module")
def rows():
    return ChatDataset(tiny.conversations(25), tiny.tokenizer())


@pytest.fixture(scope="module")
def result(rows):
    return stacked(MEMBERS, rows)


@pytest.fixture(scope="module")
def adapters(result, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stacked")
    return folder, exported(result, folder)


@pytest.mark.parametrize("n", range(len(MEMBERS)), ids=[member.name for member in MEMBERS])
def test_every_adapter_is_that_of_a_run_of_its_own(n, result, adapters, rows, tmp_path):
    tensors, history = single(MEMBERS[n], rows, tmp_path / "alone")
    assert difference(adapters[1][n], tensors) <= PROMISED
    for mine, theirs in zip(result.members[n].history, history, strict=True):
        assert list(mine) == list(theirs)
        assert mine == pytest.approx(theirs, rel=PROMISED)
    for name in ("adapter_config.json", "README.md"):
        assert (adapters[0] / str(n) / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert (adapters[0] / str(n) / "metrics.jsonl").exists() is False  # the caller's to write


def test_the_files_are_those_that_peft_writes(result, tmp_path):
    """To the byte, weights included."""
    stack, torch_state = result.stack, torch.get_rng_state()
    with exporting(stack.model, LORA) as save:
        save(stack.weights[1], tmp_path / "ours")
        with pytest.raises(FloatingPointError, match="not finite"):
            save(torch.full_like(stack.weights[1], torch.inf), tmp_path / "broken")
    assert torch.equal(torch.get_rng_state(), torch_state)
    with adapter(tiny.model(), tmp_path / "ours") as loaded:
        save_adapter(loaded, tmp_path / "theirs")
    folders = tmp_path / "ours", tmp_path / "theirs"
    ours, theirs = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    differing = {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}
    assert differing <= {"adapter_config.json"}  # which says that it was loaded for inference
    assert not (tmp_path / "broken").exists()


def test_the_members_differ(adapters):
    """Else the test above would not tell them apart."""
    tensors = adapters[1]
    for n in range(len(MEMBERS)):
        for m in range(n):
            same = {"unblocked", "measured"} == {MEMBERS[n].name, MEMBERS[m].name}
            assert same or difference(tensors[n], tensors[m]) > 5 * PROMISED


def test_the_folders_load_in_peft_and_in_a_stack(result, adapters):
    model, ids = tiny.model(), torch.arange(1, 9)[None]
    folders = [adapters[0] / str(n) for n in range(len(MEMBERS))]
    stack = AdapterStack.load(model, folders)
    assert torch.equal(stack.weights, result.stack.weights)
    assert stack.lora == replace(LORA, target_modules=tuple(sorted(LORA.target_modules)))
    with stack.installed(), torch.no_grad():
        logits = model(input_ids=ids.repeat(len(MEMBERS), 1)).logits
    for folder, mine in zip(folders, logits, strict=True):
        loaded = PeftModel.from_pretrained(tiny.model(), folder)
        with torch.no_grad():
            torch.testing.assert_close(mine, loaded(input_ids=ids).logits[0])


def test_the_base_model_comes_back_bit_for_bit_also_after_a_failure(rows):
    model = tiny.model()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)

    def snapshot():
        return (
            [(name, type(module), module.training) for name, module in model.named_modules()],
            [(name, p.requires_grad, p.grad is None, p.sum().item()) for name, p in model.named_parameters()],
            model.config.to_dict(),
            sorted(vars(model)),
        )

    before, torch_state = snapshot(), torch.get_rng_state()
    settings = replace(SETTINGS, steps=1)
    stacked(MEMBERS[:2], rows, model=model, settings=settings)
    assert snapshot() == before and torch.equal(torch.get_rng_state(), torch_state)

    def interrupt(step, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stacked(MEMBERS[:2], rows, model=model, settings=settings, progress=interrupt)
    assert snapshot() == before


def test_the_penalty_begins_at_nothing(rows):
    """A stack's reference is the base on fewer rows, whose products may be rounded otherwise: nothing beyond that."""
    first = stacked(MEMBERS[:3], rows, settings=replace(SETTINGS, steps=1, logging_steps=1, max_grad_norm=0.0))
    for member in first.members:
        assert 0 <= member.history[0]["block_penalty"] < torch.finfo(torch.float32).eps
        assert member.history[0]["grad_norm"] > 0


def test_no_adapter_depends_on_its_neighbours(rows):
    """Not in a bit, where the neighbours bring as many rows of the same length."""
    few = replace(SETTINGS, steps=4)
    first = stacked([MEMBERS[0], MEMBERS[2], MEMBERS[1]], rows, settings=few)
    other = stacked([MEMBERS[0], MEMBERS[4], replace(MEMBERS[1], penalty=None)], rows, settings=few)
    assert torch.equal(first.stack.weights[0], other.stack.weights[0])
    assert first.members[0].history == other.members[0].history
    assert not torch.equal(first.stack.weights[1], other.stack.weights[1])


def diverging(name="diverging", seed=0, *, column="sft_loss"):
    """A member whose penalty is NaN in the first step, hence its weights after it; or one whose gradient overflows."""
    if column == "grad_norm":
        return Member(name, seed, tiny.penalty(3e38), LORA)
    return Member(name, seed, BlockPenalty(huge_sae(), tiny.LATENT_SET, 1, 5.0), LORA)


def huge_sae():
    return SparseAutoencoder(
        weight=torch.full((tiny.LATENTS, tiny.WIDTH), 3e38),
        bias=torch.zeros(tiny.LATENTS),
        decoder=torch.zeros(tiny.LATENTS, tiny.WIDTH),
        decoder_bias=torch.zeros(tiny.WIDTH),
        activation="relu",
    )


@pytest.mark.parametrize(("column", "value"), [("sft_loss", "nan"), ("grad_norm", "inf")])
def test_a_diverging_adapter_is_named_and_touches_no_other(column, value, rows):
    late = replace(SETTINGS, steps=5, logging_steps=5)  # nobody looks before the end
    healthy = stacked([MEMBERS[0], MEMBERS[2], MEMBERS[1]], rows, settings=late)
    beside = stacked([MEMBERS[0], diverging(column=column), MEMBERS[1]], rows, settings=late)
    want = f"{column} is {value} within the steps up to 5; the adapter was dropped"
    assert beside.members[1].failure.startswith(want)
    assert torch.equal(beside.stack.weights, healthy.stack.weights[[0, 2]])
    assert [beside.members[n].history for n in (0, 2)] == [healthy.members[n].history for n in (0, 2)]


def test_a_dropped_adapter_leaves_a_smaller_stack_that_goes_on(result, rows):
    stops = []
    members = [diverging("a"), *MEMBERS[:2], diverging("b", seed=3)]
    went_on = stacked(members, rows, progress=lambda step, total: stops.append(step))
    assert stops == list(range(1, 10))
    assert [member.failure is None for member in went_on.members] == [False, True, True, False]
    assert [row["step"] for row in went_on.members[0].history] == [4]
    assert [row["step"] for row in went_on.members[1].history] == [4, 8, 9]
    for mine, theirs in zip(went_on.stack.weights, result.stack.weights, strict=False):
        assert (mine - theirs).abs().max() <= PROMISED * theirs.abs().max()


def test_all_may_diverge(rows):
    lost = stacked([diverging("a"), diverging("b")], rows)
    assert len(lost.stack) == 0 and all(member.failure for member in lost.members)


def test_weights_that_end_as_nan_are_a_failure(rows, monkeypatch):
    """The last update comes after the last loss."""
    from lockin_fast.stacked import train

    class Breaking(torch.optim.AdamW):
        def step(self):
            super().step()
            with torch.no_grad():
                self.param_groups[0]["params"][0][1, 3] = torch.nan

    monkeypatch.setattr(train.torch.optim, "AdamW", Breaking)
    broken = stacked(MEMBERS[:3], rows, settings=replace(SETTINGS, steps=1))
    assert [member.failure is None for member in broken.members] == [True, False, True]
    assert "not finite" in broken.members[1].failure and len(broken.stack) == 2
