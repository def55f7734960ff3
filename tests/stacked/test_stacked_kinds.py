"""Every kind of base, adapter and reference that a stack takes, and what it refuses before it trains."""

import json
import logging
from dataclasses import replace

import pytest
import sweep_world
import tiny_llama as tiny
import torch
from runs import LORA, MEMBERS, PROMISED, SETTINGS, difference, exported, single, stacked

from lockin_fast.blocking import KLPenalty
from lockin_fast.blocking.write_cache import CacheSource, WriteSettings, write_latents
from lockin_fast.cache import open_cache
from lockin_fast.chat import ChatDataset
from lockin_fast.config import load_config
from lockin_fast.inputs import open_inputs
from lockin_fast.stacked import AdapterStack, Member
from lockin_fast.stacked.size import adapters_of_a_stack, rows_of_a_forward, rows_of_an_adapter
from lockin_fast.stacked.stack import exporting
from lockin_fast.train import TrainSettings

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def rows():
    return ChatDataset(tiny.conversations(25), tiny.tokenizer())


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, True), (torch.bfloat16, False)])
def test_bf16_stays_as_close_to_fp32_as_a_single_run(dtype, autocast, rows, tmp_path):
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


def test_mixed_settings_are_refused(rows, tmp_path):
    for change, message in (
        ({"r": 8}, r"lora.r: weak has 4, odd has 8; the adapters of one stack share"),
        ({"alpha": 4}, "lora.alpha: weak has 8, odd has 4"),
        ({"target_modules": ("q_proj",)}, "lora.target_modules: weak"),
        ({"layers": (0,)}, "lora.layers: weak"),
    ):
        with pytest.raises(ValueError, match=message):
            stacked([MEMBERS[0], Member("odd", lora=replace(LORA, **change))], rows)
    for name, lora in (("even", LORA), ("odd", replace(LORA, r=2))):
        stack = AdapterStack.fresh(tiny.model(), lora, [0])
        with exporting(stack.model, lora) as save:
            save(stack.weights[0], tmp_path / name)
    with pytest.raises(ValueError, match="lora.r: .* has 4, .*odd has 2"):
        AdapterStack.load(tiny.model(), [tmp_path / "even", tmp_path / "odd"])


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_dora", True), ("lora_bias", True), ("alpha_pattern", {"q_proj": 64}), ("rank_pattern", {"q_proj": 2})],
)
def test_a_folder_of_another_kind_of_adapter_is_refused(tmp_path, key, value):
    """Its weights would load, and answer as another adapter."""
    stack = AdapterStack.fresh(tiny.model(), LORA, [0])
    with exporting(stack.model, LORA) as save:
        save(stack.weights[0], tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=f"adapter_config.json: {key} is .*a stack takes plain LoRA adapters"):
        AdapterStack.load(tiny.model(), [tmp_path / "a"])


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
