"""A stack against runs of its members alone: the same adapters, whatever sets them apart, and no word between them."""

import logging
from dataclasses import replace

import pytest
import sweep_world
import tiny_llama as tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file

from lockin_fast.blocking import BlockPenalty, KLPenalty, LatentSet
from lockin_fast.blocking.write_cache import CacheSource, WriteSettings, write_latents
from lockin_fast.cache import open_cache
from lockin_fast.chat import ChatDataset
from lockin_fast.config import load_config
from lockin_fast.inputs import open_inputs
from lockin_fast.lora import adapter, save_adapter
from lockin_fast.sae import SparseAutoencoder
from lockin_fast.stacked import AdapterStack, Member, train_stack
from lockin_fast.stacked.size import adapters_of_a_stack, rows_of_a_forward, rows_of_an_adapter
from lockin_fast.stacked.stack import exporting
from lockin_fast.train import LoraSettings, TrainSettings, fine_tune

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
PROMISED = 1e-3  # the largest difference of a weight, relative to the largest weight of its matrix
LORA = LoraSettings(r=4, alpha=8, target_modules=("q_proj", "v_proj", "down_proj"))
# Accumulated, clipped, decayed; 25 rows leave a smaller batch, of an odd number, at the end of an epoch.
SETTINGS = TrainSettings(
    steps=9, batch_size=8, micro_batch_size=4, learning_rate=1e-2, warmup_steps=2, weight_decay=0.1, max_grad_norm=0.1,
    logging_steps=4,
)  # fmt: skip
MEMBERS = [
    Member("weak", 0, tiny.penalty(5.0), LORA),
    Member("other seed", 1, tiny.penalty(500.0), LORA),
    Member("other set", 0, tiny.penalty(50.0, latents=LatentSet((1, 2), (9,)), tokens="all"), LORA),
    Member("unblocked", 1, None, LORA),
    Member("measured", 0, tiny.penalty(0.0), LORA),
    Member("two layers", 2, (tiny.penalty(7.0, layer=0), tiny.penalty(7.0, layer=2)), LORA),
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def rows(tokenizer):
    return ChatDataset(tiny.conversations(25), tokenizer)


def stacked(members, rows, *, model=None, settings=SETTINGS, **options):
    return train_stack(model or tiny.model(), tiny.tokenizer(), rows, members, settings=settings, **options)


def single(member, rows, folder, *, model=None, settings=SETTINGS):
    """(adapter tensors, history) of a run of its own."""
    result = fine_tune(
        model or tiny.model(), tiny.tokenizer(), rows, folder, lora=member.lora,
        settings=replace(settings, seed=member.seed), penalty=member.penalty,
    )  # fmt: skip
    return load_file(folder / "adapter_model.safetensors"), result.history


def exported(result, folder, *, model=None, lora=LORA):
    """Adapter tensors of every member, as written to folder/<number>."""
    with exporting(model or tiny.model(), lora) as save:
        for n, row in enumerate(result.stack.weights):
            save(row, folder / str(n))
    return [load_file(folder / str(n) / "adapter_model.safetensors") for n in range(len(result.stack))]


def difference(mine, theirs):
    assert mine.keys() == theirs.keys()
    return max(float((mine[key] - theirs[key]).abs().max() / theirs[key].abs().max()) for key in mine)


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
    stack = result.stack
    with exporting(stack.model, LORA) as save:
        save(stack.weights[1], tmp_path / "ours")
        with pytest.raises(FloatingPointError, match="not finite"):
            save(torch.full_like(stack.weights[1], torch.inf), tmp_path / "broken")
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


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, True), (torch.bfloat16, False)])
def test_bf16_stays_as_close_to_fp32_as_a_single_run(dtype, autocast, result, rows, tmp_path):
    settings = replace(SETTINGS, steps=2, bf16=autocast)
    model, member = tiny.model(dtype=dtype), MEMBERS[0]
    (mine,) = exported(stacked([member], rows, model=model, settings=settings), tmp_path / "stacked", model=model)
    own, _ = single(member, rows, tmp_path / "own", model=model, settings=settings)
    exact, _ = single(member, rows, tmp_path / "exact", settings=replace(settings, bf16=False))
    assert {key: tensor.dtype for key, tensor in mine.items()} == {key: tensor.dtype for key, tensor in own.items()}
    assert difference(mine, exact) <= 2 * difference(own, exact)


def test_rslora_checkpointing_and_kl_to_the_base(rows, tmp_path):
    """Also with an early end of the reference's forward impossible: KL needs all of it."""
    model = tiny.model()
    lora = replace(LORA, use_rslora=True)
    terms = KLPenalty(model, 2.0), (KLPenalty(model, 1.0), tiny.penalty())
    members = [Member(f"{n}", n, term, lora) for n, term in enumerate(terms)]
    settings = replace(SETTINGS, steps=3, gradient_checkpointing=True)
    together = stacked(members, rows, model=model, settings=settings)
    mine = exported(together, tmp_path / "stacked", model=model, lora=lora)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    for n, member in enumerate(members):
        own, history = single(member, rows, tmp_path / str(n), model=model, settings=settings)
        assert difference(mine[n], own) <= PROMISED
        assert together.members[n].history[-1] == pytest.approx(history[-1], rel=PROMISED)
        assert list(together.members[n].history[-1]) == list(history[-1])
    folders = [tmp_path / "stacked" / "0"]
    assert AdapterStack.load(model, folders).lora.use_rslora


def test_against_a_cache_as_against_the_live_reference(rows, tmp_path):
    source = CacheSource(tiny.model(), 1, rows, tokens="all")
    write_latents(tmp_path / "cache", source, tiny.sae(), range(tiny.LATENTS), settings=WriteSettings(batch_size=8))
    few = replace(SETTINGS, steps=3)

    def members(reference):
        terms = [tiny.penalty(50.0, reference=reference), tiny.penalty(5.0, tokens="all", reference=reference)]
        return [Member(f"{n}", n // 2, terms[n % 2], LORA) for n in range(4)]

    cached = stacked(members(open_cache(tmp_path / "cache")), rows, settings=few)
    live = stacked(members("live"), rows, settings=few)
    assert (cached.stack.weights - live.stack.weights).abs().max() <= PROMISED * live.stack.weights.abs().max()
    for mine, theirs in zip(cached.members, live.members, strict=True):
        for name in ("sft_loss", "block_penalty", "grad_norm"):  # not the active pairs: rounding makes some active
            assert mine.history[-1][name] == pytest.approx(theirs.history[-1][name], rel=PROMISED)


def test_a_4_bit_base(tmp_path):
    pytest.importorskip("bitsandbytes")
    world = sweep_world.build_world(tmp_path / "world")
    config = load_config(world, ["quantization=nf4"])
    inputs = open_inputs(config, config.sweep.latents)
    members = [
        Member("a", 0, inputs.penalty("causal", 10.0), config.lora),
        Member("b", 1, inputs.penalty("random", 100.0), config.lora),
    ]
    stack = stacked(members, inputs.dataset, model=inputs.model, settings=config.train)
    mine = exported(stack, tmp_path / "stacked", model=inputs.model, lora=config.lora)
    for n, member in enumerate(members):
        own, _ = single(member, inputs.dataset, tmp_path / str(n), model=inputs.model, settings=config.train)
        assert difference(mine[n], own) <= PROMISED


def test_mixed_settings_are_refused(rows, adapters, tmp_path):
    for change, message in (
        ({"r": 8}, r"lora.r: weak has 4, odd has 8; the adapters of one stack share"),
        ({"alpha": 4}, "lora.alpha: weak has 8, odd has 4"),
        ({"target_modules": ("q_proj",)}, "lora.target_modules: weak"),
        ({"layers": (0,)}, "lora.layers: weak"),
    ):
        with pytest.raises(ValueError, match=message):
            stacked([MEMBERS[0], Member("odd", lora=replace(LORA, **change))], rows)
    few = AdapterStack.fresh(tiny.model(), replace(LORA, r=2), [0])
    with exporting(tiny.model(), few.lora) as save:
        save(few.weights[0], tmp_path / "odd")
    with pytest.raises(ValueError, match="lora.r: .* has 4, .*odd has 2"):
        AdapterStack.load(tiny.model(), [adapters[0] / "0", tmp_path / "odd"])


def test_what_a_stack_cannot_do_is_refused_before_training(rows):
    def never(step, total):
        raise AssertionError("it trained")

    dropping = tiny.model(attention_dropout=0.1)
    unreachable = Member("a", lora=replace(LORA, layers=(2,)), penalty=tiny.penalty(layer=1))
    for members, options, message in (
        ([], {}, "members: got none"),
        ([Member("a", lora=replace(LORA, dropout=0.1))], {}, "lora.dropout is 0.1"),
        ([Member("a", lora=replace(LORA, use_dora=True))], {}, "lora.use_dora: a stack trains LoRA adapters"),
        ([Member("a", lora=LORA)], {"model": dropping}, "attention_dropout is 0.1"),
        ([Member("a", 0, tiny.penalty(reference=tiny.model()), LORA)], {}, "reference: a stack has its base model"),
        ([unreachable], {}, "the lowest is 2, above the penalised layer 1"),
        ([Member("a", lora=replace(LORA, target_modules=("nope",)))], {}, "lora.target_modules"),
    ):
        with pytest.raises(ValueError, match=message):
            stacked(members, rows, progress=never, **options)


def test_rows_of_a_forward():
    settings = TrainSettings(batch_size=32, micro_batch_size=8)
    assert [rows_of_an_adapter(n, 48, settings) for n in (1, 2, 3, 12, 13, 48, 100)] == [32, 16, 16, 4, 2, 1, 1]
    model = tiny.model()
    short, long = (rows_of_a_forward(model, length, settings) for length in (10, 10**9))
    assert short > 100 and long == 8  # never less than the user's own micro-batch
    assert adapters_of_a_stack(model, 10, settings) == 16 and adapters_of_a_stack(model, 10**9, settings) == 8
