"""The block penalty in the trainer: right loss and gradients, right normalisation, nothing left behind."""

import math

import pytest
import tiny_llama as tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from lockin_fast.blocking import BlockTrainer, LatentBlockMixin, attach
from lockin_fast.chat import ChatDataset, PaddingCollator

LAYER = 1
IGNORED = -100


def adapted(*, dtype=torch.float32, random_b=False, seed=3, **lora):
    """A tiny Llama with LoRA on attention; B = 0, or random so that the penalty is active."""
    base = tiny.model(dtype=dtype)
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(r=4, **{"target_modules": ["q_proj", "v_proj"], **lora}))
    if random_b:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def rows():
    return ChatDataset(tiny.conversations(24), tiny.tokenizer())


def make(cls, folder, model, rows, **options):
    extra = {key: options.pop(key) for key in ("penalty", "eval_dataset", "callbacks") if key in options}
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        logging_nan_inf_filter=False,
        **{"learning_rate": 1e-2, "max_steps": 3, "per_device_train_batch_size": 8, "logging_steps": 1, **options},
    )  # fmt: skip
    return cls(model=model, args=arguments, train_dataset=rows, data_collator=PaddingCollator(0), **extra)


def adapter(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def history(trainer, key):
    return [row[key] for row in trainer.state.log_history if "loss" in row]


def eager_loss(model, batch, penalty):
    """L_SFT + lambda * L_block as people write it: every hidden state, a full second forward, every latent."""
    sae, layer = tiny.sae(), penalty.layer
    weight, bias = sae.weight.to(model.dtype), sae.bias.to(model.dtype)
    output = model(**batch, output_hidden_states=True)
    with torch.no_grad(), model.disable_adapter():
        reference = model(**batch, output_hidden_states=True).hidden_states[layer + 1]
    z = (output.hidden_states[layer + 1] @ weight.T + bias).relu()
    z_ref = (reference @ weight.T + bias).relu()
    up = (z - z_ref)[..., list(penalty.latents.positive)].relu().square().sum(-1)
    down = (z_ref - z)[..., list(penalty.latents.negative)].relu().square().sum(-1)
    supervised = batch["labels"] != IGNORED
    block = (up + down)[supervised].sum() / (batch["labels"][:, 1:] != IGNORED).sum()
    return output.loss + penalty.weight * block


def test_loss_and_every_gradient_are_those_of_the_eager_code(tmp_path, rows):
    batch, penalty = PaddingCollator(0)([rows[i] for i in range(8)]), tiny.penalty(500.0)

    def measured(dtype, loss_of):
        model = adapted(dtype=dtype, random_b=True).train()
        loss = loss_of(model)
        loss.backward()
        return {"loss": loss.detach().double()} | {
            name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None
        }

    def fused(model):
        trainer = make(BlockTrainer, tmp_path, model, rows, penalty=penalty)
        trainer.current_gradient_accumulation_steps = 1
        return trainer.compute_loss(model, dict(batch))

    eps = torch.finfo(torch.float32).eps
    truth = measured(torch.float64, lambda model: eager_loss(model, batch, penalty))
    eager = measured(torch.float32, lambda model: eager_loss(model, batch, penalty))
    ours = measured(torch.float32, fused)
    assert ours.keys() == truth.keys() and len(truth) == 1 + 2 * 2 * tiny.LAYERS
    for name, exact in truth.items():
        scale = exact.abs().max()
        allowed = 2 * (eager[name] - exact).abs().max() + 8 * eps * scale
        assert (ours[name] - exact).abs().max() <= allowed, name
    plain = measured(torch.float64, lambda model: model(**batch).loss)
    assert truth["loss"] > 1.1 * plain["loss"], "the penalty is too small for this test to see it"


@pytest.mark.parametrize("autocast", [False, True])
def test_the_penalty_of_the_first_step_is_exactly_zero(tmp_path, rows, autocast):
    trainer = make(BlockTrainer, tmp_path, adapted(lora_dropout=0.1), rows, penalty=tiny.penalty(), bf16=autocast)
    trainer.train()
    first, *later = history(trainer, "block_penalty")
    assert first == 0.0 and min(later) > 0.0 and all(map(math.isfinite, later))
    assert history(trainer, "active_fraction")[0] == 0.0


def test_a_bf16_model_starts_at_zero_too(tmp_path, rows):
    trainer = make(BlockTrainer, tmp_path, adapted(dtype=torch.bfloat16), rows, penalty=tiny.penalty())
    trainer.train()
    first, *later = history(trainer, "block_penalty")
    assert first == 0.0 and min(later) > 0.0


class MeanPerMicroBatch(BlockTrainer):
    """The normalisation that silently makes lambda larger with accumulation, to show that the test below sees it."""

    def _penalty_scale(self, labels, num_items_in_batch):
        return 1.0 / (labels != IGNORED).sum()


def rounding(rows):
    """Summing a step's tokens in another order moves a sum by at most an ulp a token."""
    return 3 * 8 * max(len(row["labels"]) for row in rows) * torch.finfo(torch.float32).eps


def train_split(cls, folder, rows, micro, **options):
    """Three steps of batch 8 in micro-batches: adapter, largest move, logs. SGD passes rounding on as it is."""
    model = adapted(random_b=True)
    trainer = make(
        cls, folder, model, rows, penalty=tiny.penalty(500.0, **options), optim="sgd", learning_rate=0.1,
        per_device_train_batch_size=micro, gradient_accumulation_steps=8 // micro,
    )  # fmt: skip
    before = adapter(trainer)
    trainer.train()
    after = adapter(trainer)
    return after, largest_difference(before, after), history(trainer, "sft_loss") + history(trainer, "block_penalty")


def test_splitting_a_batch_changes_nothing(tmp_path, rows):
    for splits, options in (((2,), {"tokens": "all"}), ((4, 2, 1), {})):
        whole, moved, whole_logs = train_split(BlockTrainer, tmp_path, rows, 8, **options)
        for micro in splits:
            split, _, logs = train_split(BlockTrainer, tmp_path, rows, micro, **options)
            assert largest_difference(whole, split) <= rounding(rows) * moved, f"{8 // micro} of {micro}"
            assert logs == pytest.approx(whole_logs, rel=rounding(rows))
    wrong, _, _ = train_split(MeanPerMicroBatch, tmp_path, rows, 2)
    assert largest_difference(whole, wrong) > 100 * rounding(rows) * moved


class AveragingTrainer(BlockTrainer):
    """A trainer whose loss is a mean per micro-batch, divided by the accumulation steps afterwards."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


def test_where_the_trainer_averages_micro_batches_so_does_the_penalty(tmp_path):
    # Rows of one length: then the mean of means is the mean, and splitting must change nothing here either.
    conversations = [
        {"messages": [{"role": "user", "content": f"w{i}"}, {"role": "assistant", "content": f"w{i + 1} w3 w{i % 4}"}]}
        for i in range(24)
    ]
    rows = ChatDataset(conversations, tiny.tokenizer())
    whole, moved, whole_logs = train_split(AveragingTrainer, tmp_path, rows, 8)
    split, _, logs = train_split(AveragingTrainer, tmp_path, rows, 2)
    assert largest_difference(whole, split) <= rounding(rows) * moved
    assert logs == pytest.approx(whole_logs, rel=rounding(rows))


def test_logs_add_up(tmp_path, rows):
    trainer = make(BlockTrainer, tmp_path, adapted(random_b=True), rows, penalty=tiny.penalty(7.0), logging_steps=2)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 1 and logged[0]["lambda"] == 7.0 and 0 < logged[0]["active_fraction"] < 1
    assert logged[0]["loss"] == pytest.approx(logged[0]["sft_loss"] + 7.0 * logged[0]["block_penalty"], rel=1e-5)
    assert trainer.state.log_history[-1]["sft_loss"] > 0  # the third step, which no logging step covered


class Subclass(Trainer):
    """A trainer with a loss and logs of its own, as TRL's are."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs["use_cache"] = False
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        super().log({**logs, "own": 1.0}, *args, **kwargs)


@pytest.mark.parametrize("cls", [Trainer, Subclass])
def test_attach_equals_block_trainer(tmp_path, rows, cls):
    penalty = tiny.penalty(50.0)  # made first: it draws random numbers
    block = make(BlockTrainer, tmp_path, adapted(), rows, penalty=penalty)
    block.train()
    attached = make(cls, tmp_path, adapted(), rows)
    assert attach(attached, penalty) is attached
    assert isinstance(attached, cls) and isinstance(attached, LatentBlockMixin)
    attached.train()
    assert largest_difference(adapter(block), adapter(attached)) == 0.0
    assert history(attached, "block_penalty") == history(block, "block_penalty")
    plain = make(cls, tmp_path, adapted(), rows)
    plain.train()
    assert largest_difference(adapter(plain), adapter(attached)) > 0.0
    if cls is Subclass:
        assert history(attached, "own") == [1.0] * 3


def test_attach_replaces_a_penalty_and_leaves_a_refused_trainer_alone(tmp_path, rows):
    trainer = make(Trainer, tmp_path, adapted(), rows)
    with pytest.raises(ValueError, match="layer: got 9, expected 0 to 2"):
        attach(trainer, tiny.penalty(layer=9))
    assert type(trainer) is Trainer
    attach(trainer, tiny.penalty(1.0))
    cls = type(trainer)
    attach(trainer, tiny.penalty(2.0))
    assert type(trainer) is cls and trainer.loss_terms[0].weight == 2.0
    with pytest.raises(TypeError, match="trainer: got Linear"):
        attach(torch.nn.Linear(1, 1), tiny.penalty())
    with pytest.raises(TypeError, match="penalty: got float"):
        attach(trainer, 1.0)


def test_without_a_penalty_and_with_lambda_zero_it_is_the_plain_trainer(tmp_path, rows):
    results = {}
    for name, cls, options in (
        ("plain", Trainer, {}), ("none", BlockTrainer, {}), ("zero", BlockTrainer, {"penalty": tiny.penalty(0.0)})
    ):  # fmt: skip
        trainer = make(cls, tmp_path, adapted(), rows, **options)
        trainer.train()
        results[name] = trainer
    for name in ("none", "zero"):
        assert largest_difference(adapter(results["plain"]), adapter(results[name])) == 0.0
        assert history(results[name], "sft_loss") == pytest.approx(history(results["plain"], "loss"))
    assert "block_penalty" not in results["none"].state.log_history[0]
    assert history(results["zero"], "block_penalty")[-1] > 0.0  # measured all the same


def test_evaluation_shows_the_plain_loss(tmp_path, rows):
    plain = make(Trainer, tmp_path, adapted(random_b=True), rows, eval_dataset=rows)
    block = make(BlockTrainer, tmp_path, adapted(random_b=True), rows, eval_dataset=rows, penalty=tiny.penalty(1e3))
    assert block.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    block.model.train()
    batch = PaddingCollator(0)([rows[0], rows[1]])
    loss, outputs = block.compute_loss(block.model, batch, return_outputs=True)
    assert outputs.logits.shape[:2] == batch["labels"].shape and loss > outputs.loss


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_adapter(tmp_path, rows, reentrant):
    def train(checkpointing):
        model = adapted(random_b=True)
        if checkpointing:
            model.enable_input_require_grads()
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        trainer = make(
            BlockTrainer, tmp_path, model, rows, penalty=tiny.penalty(500.0), optim="sgd", learning_rate=0.1,
            **(options if checkpointing else {}),
        )  # fmt: skip
        before = adapter(trainer)
        trainer.train()
        return adapter(trainer), largest_difference(before, adapter(trainer)), history(trainer, "block_penalty")

    (plain, moved, plain_penalty), (checkpointed, _, penalty) = train(False), train(True)
    # Reentrant checkpointing adds the gradients of a parameter in another order.
    assert largest_difference(plain, checkpointed) <= rounding(rows) * moved
    assert penalty == pytest.approx(plain_penalty, rel=rounding(rows)) and penalty[0] > 0


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_no_hook_is_left_after_training_or_after_a_crash(tmp_path, rows):
    trainer = make(BlockTrainer, tmp_path, adapted(), rows, penalty=tiny.penalty())
    before = hooks(trainer.model)
    trainer.train()
    assert hooks(trainer.model) == before
    trainer.model.base_model.model.lm_head.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert hooks(trainer.model) == before


def test_a_frozen_second_model_serves_full_fine_tuning(tmp_path, rows):
    model = tiny.model()
    with pytest.raises(ValueError, match="pass a frozen copy of the base model as reference="):
        make(BlockTrainer, tmp_path, model, rows, penalty=tiny.penalty())
    trainer = make(BlockTrainer, tmp_path, model, rows, penalty=tiny.penalty(reference=tiny.model()))
    trainer.train()
    assert history(trainer, "block_penalty")[0] == 0.0 and history(trainer, "block_penalty")[-1] > 0.0


def test_what_cannot_work_is_refused_before_training(tmp_path, rows):
    with pytest.raises(TypeError, match="penalty: got float, expected a BlockPenalty"):
        make(BlockTrainer, tmp_path, adapted(), rows, penalty=3.0)
    with pytest.raises(ValueError, match="layer: got 3, expected 0 to 2"):
        make(BlockTrainer, tmp_path, adapted(), rows, penalty=tiny.penalty(layer=3))
    trainer = make(Trainer, tmp_path, adapted(), rows)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="DataParallel over 2 GPUs is not supported"):
        attach(trainer, tiny.penalty())


def test_an_sae_of_another_width_is_refused(tmp_path, rows):
    from lockin_fast.blocking import BlockPenalty
    from lockin_fast.sae import SparseAutoencoder

    sae = SparseAutoencoder(torch.ones(64, 16), torch.zeros(64), torch.ones(64, 16), torch.zeros(16))
    with pytest.raises(ValueError, match="sae: reads hidden states of width 16, the model's are 32 wide"):
        make(BlockTrainer, tmp_path, adapted(), rows, penalty=BlockPenalty(sae, tiny.LATENT_SET, 1, 1.0))


def test_labels_that_are_all_masked_are_refused_before_training(tmp_path, rows):
    masked = [{**rows[i], "labels": torch.full_like(rows[i]["labels"], IGNORED)} for i in range(8)]
    model = adapted()
    with pytest.raises(ValueError, match="every label of its 8 rows is -100"):
        make(BlockTrainer, tmp_path, model, masked, penalty=tiny.penalty()).train()
    trainer = make(BlockTrainer, tmp_path, model, [], penalty=tiny.penalty())
    with pytest.raises(ValueError, match="empty dataset"):
        trainer.train()


def test_adapters_above_the_layer_are_refused(tmp_path, rows):
    model = adapted(layers_to_transform=[2])
    trainer = make(BlockTrainer, tmp_path, model, rows, penalty=tiny.penalty())
    with pytest.raises(RuntimeError, match="the output of layer 1 takes no gradient"):
        trainer.train()


def test_a_loss_that_is_not_finite_stops_training(tmp_path, rows):
    model = adapted()
    model.base_model.model.lm_head.weight.data[0, 0] = float("nan")
    trainer = make(BlockTrainer, tmp_path, model, rows, penalty=tiny.penalty())
    with pytest.raises(FloatingPointError, match="sft_loss is nan .* training stopped"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_two_blocked_layers_add_up_and_share_one_reference_forward(tmp_path, rows):
    """Loss and gradients are the sums of those with one layer each; the reference runs once, to the upper layer."""
    batch = PaddingCollator(0)([rows[i] for i in range(8)])
    upper = tiny.LATENT_SET.take(3)

    def measured(*penalties):
        model = adapted(random_b=True).train()
        trainer = make(BlockTrainer, tmp_path, model, rows, penalty=penalties)
        trainer.current_gradient_accumulation_steps = 1
        forwards = []
        model.base_model.model.model.layers[0].register_forward_hook(lambda *_: forwards.append(1))
        loss = trainer.compute_loss(model, dict(batch))
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach()} | grads, len(forwards)

    (plain, once), (first, _), (second, _), (both, forwards) = (
        measured(*penalties)
        for penalties in (
            (),
            (tiny.penalty(5.0, layer=0),),
            (tiny.penalty(5.0, layer=2, latents=upper),),
            (tiny.penalty(5.0, layer=0), tiny.penalty(5.0, layer=2, latents=upper)),
        )
    )
    assert once == 1 and forwards == 2
    for name, value in both.items():
        expected = first[name] + second[name] - plain[name]
        scale = max(part[name].abs().max() for part in (plain, first, second, both))
        assert (value - expected).abs().max() <= rounding(rows) * scale, name
    assert both["loss"] > first["loss"] > plain["loss"]


def test_terms_of_one_column_share_one_lambda(tmp_path, rows):
    with pytest.raises(ValueError, match="the terms that log block_penalty have the weights 1 and 2"):
        make(BlockTrainer, tmp_path, adapted(), rows, penalty=[tiny.penalty(1.0), tiny.penalty(2.0, layer=2)])
