"""TRL's SFTTrainer with the block penalty: completion-only, padding-free, packed, and as eager code computes it."""

import pytest
import tiny_llama as tiny
import torch
from peft import LoraConfig
from test_trainer import adapted, adapter, eager_loss, history, largest_difference
from transformers import AutoModelForCausalLM

from lockin_fast import CacheSource, open_cache, write_latents
from lockin_fast.blocking import LatentBlockMixin, attach, reference
from lockin_fast.quantized import quantization_config

trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")

IGNORED = -100
LENGTH = 40


class BlockSFTTrainer(LatentBlockMixin, trl.SFTTrainer):
    pass


@pytest.fixture(scope="module", autouse=True)
def quiet():
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def rows():
    """16 prompts with completions of 2 to 9 words."""
    made = []
    for row in tiny.conversations(16):
        question, answer = row["messages"][:2]
        made.append({"prompt": f"<user> {question['content']} <assistant>", "completion": f" {answer['content']}"})
    return datasets.Dataset.from_list(made)


def make(cls, folder, model, rows, *, penalty=None, peft_config=None, **options):
    arguments = trl.SFTConfig(
        output_dir=str(folder), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, bf16=False,
        optim="sgd", shuffle_dataset=False,
        **{
            "gradient_checkpointing": False,
            "max_length": LENGTH, "learning_rate": 0.1, "max_steps": 2, "per_device_train_batch_size": 16,
            "logging_steps": 1, **options,
        },
    )  # fmt: skip
    extra = {"penalty": penalty} if penalty is not None else {}
    return cls(
        model=model, args=arguments, train_dataset=rows, processing_class=tiny.tokenizer(), peft_config=peft_config,
        **extra,
    )  # fmt: skip


def forwards(model):
    """Counts the forwards of the model's last decoder layer, which the reference never reaches."""
    seen = []
    model.base_model.model.model.layers[-1].register_forward_hook(lambda *_: seen.append(1))
    return seen


def test_one_forward_a_step_and_the_loss_of_the_eager_code(tmp_path, rows):
    model, penalty = adapted(random_b=True), tiny.penalty(500.0)
    trainer = make(BlockSFTTrainer, tmp_path, model, rows, penalty=penalty)
    seen, before = forwards(model), adapter(trainer)
    batch = next(iter(trainer.get_train_dataloader()))
    batch = {key: batch[key] for key in ("input_ids", "attention_mask", "labels") if key in batch}
    assert (batch["labels"] == IGNORED).any() and (batch["labels"] != IGNORED).any()
    trainer.train()
    assert len(seen) == 2
    assert largest_difference(before, adapter(trainer)) > 0
    fresh = adapted(random_b=True).train()
    expected = eager_loss(fresh, batch, penalty)
    plain = fresh(**batch).loss
    assert history(trainer, "loss")[0] == pytest.approx(expected.item(), rel=1e-5)
    assert expected > 1.1 * plain


def trained(folder, rows, cls=BlockSFTTrainer, model=None, **options):
    """(adapter after 2 steps, how far it moved, losses and penalties) of a run."""
    model = adapted(random_b=True) if model is None else model
    trainer = make(cls, folder, model, rows, **{"penalty": tiny.penalty(500.0), **options})
    before = adapter(trainer)
    trainer.train()
    logs = [history(trainer, key) for key in ("loss", "block_penalty", "active_fraction")]
    return adapter(trainer), largest_difference(before, adapter(trainer)), torch.tensor(logs)


@pytest.fixture(scope="module")
def padded(tmp_path_factory, rows):
    return trained(tmp_path_factory.mktemp("padded"), rows)


# Sums over the tokens of two steps in another order, each an ulp a token at most.
ROUNDING = 2 * 16 * LENGTH * torch.finfo(torch.float32).eps


def assert_same(run, expected):
    (weights, _, logs), (wanted, moved, wanted_logs) = run, expected
    assert moved > 0 and wanted_logs[1].min() > 0
    assert largest_difference(weights, wanted) <= ROUNDING * moved
    torch.testing.assert_close(logs, wanted_logs, rtol=ROUNDING, atol=0.0)


@pytest.mark.parametrize("micro", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_accumulation_leaves_lambda_alone(tmp_path, rows, padded, micro):
    options = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 16 // micro}
    assert_same(trained(tmp_path, rows, **options), padded)


def collated(trainer):
    return next(iter(trainer.get_train_dataloader()))


def test_padding_free_batches_have_no_mask_and_the_same_penalty(tmp_path, rows, padded):
    trainer = make(BlockSFTTrainer, tmp_path, adapted(random_b=True), rows, padding_free=True, max_length=None)
    batch = collated(trainer)
    assert "attention_mask" not in batch and len(batch["input_ids"]) == 1
    assert (batch["position_ids"] == 0).sum() == 16
    assert_same(trained(tmp_path, rows, padding_free=True, max_length=None), padded)


def test_packed_rows_have_the_penalty_of_the_unpacked(tmp_path, rows, padded):
    trainer = make(BlockSFTTrainer, tmp_path, adapted(random_b=True), rows, packing=True)
    packs = len(trainer.train_dataset)
    assert 1 < packs < 16 and (collated(trainer)["position_ids"] == 0).sum() == 16
    assert_same(trained(tmp_path, rows, packing=True, per_device_train_batch_size=packs), padded)


def test_an_attached_trainer_that_makes_its_own_adapter(tmp_path, rows):
    trainer = make(trl.SFTTrainer, tmp_path, tiny.model(), rows, peft_config=LoraConfig(r=4))
    attach(trainer, tiny.penalty(50.0)).train()
    first, second = history(trainer, "block_penalty")
    assert first == 0.0 < second and "mean_token_accuracy" in trainer.state.log_history[0]


def test_a_reference_that_runs_to_its_end_makes_no_loss(tmp_path, rows, padded, monkeypatch):
    """As under FSDP, whose collectives must not be cut short; TRL's own head would ask for labels."""
    monkeypatch.setattr(reference, "is_sharded", lambda model: True)
    assert_same(trained(tmp_path, rows), padded)


@pytest.mark.parametrize("options", [{}, {"padding_free": True, "max_length": None}, {"packing": True}], ids=str)
def test_a_cache_serves_them_all(tmp_path, rows, padded, options):
    """It is written from the rows as the trainer tokenised them, before anything is packed."""
    tokenised = make(BlockSFTTrainer, tmp_path, adapted(), rows).train_dataset
    documents = [{"input_ids": torch.tensor(row["input_ids"])} for row in tokenised]
    write_latents(tmp_path / "cache", CacheSource(tiny.model(), 1, documents, "all"), tiny.sae(), tiny.LATENT_SET)
    penalty = tiny.penalty(500.0, reference=open_cache(tmp_path / "cache"))
    assert_same(trained(tmp_path, rows, penalty=penalty, **options), padded)


@pytest.mark.parametrize("packing", [False, True])
def test_a_4_bit_base_in_trls_own_way(tmp_path, rows, packing):
    """TRL casts the adapters to bf16 and checkpoints the layers; packed rows bring no attention mask."""
    pytest.importorskip("bitsandbytes")
    tiny.model(dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype="auto", device_map={"": "cpu"},
        quantization_config=quantization_config("nf4", torch.bfloat16),
    )  # fmt: skip
    trainer = make(
        BlockSFTTrainer, tmp_path, base, rows, penalty=tiny.penalty(50.0), peft_config=LoraConfig(r=4), packing=packing,
        max_steps=4, gradient_checkpointing=True,
    )  # fmt: skip
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.bfloat16}
    trainer.train()
    first, *later = history(trainer, "block_penalty")
    assert first == 0.0 < later[-1]
