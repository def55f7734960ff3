"""Kinds of adapters and of base models: the eager loss, exactly zero at the start, lambda whatever the micro-batch."""

import logging
from importlib import import_module

import pytest
import tiny_llama as tiny
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from test_trainer import IGNORED, adapter, history, largest_difference, make, rounding, rows  # noqa: F401
from transformers import AutoModelForCausalLM

from lockin_fast.blocking import BlockTrainer
from lockin_fast.chat import PaddingCollator
from lockin_fast.quantized import quantization_config

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# name -> (options of LoRA, quantisation, dtype of the base model, whether PEFT prepares it)
KINDS = {
    "rsLoRA": ({"use_rslora": True}, None, torch.float32, False),
    "DoRA": ({"use_dora": True}, None, torch.float32, False),
    "NF4, residual stream in fp32": ({}, "nf4", torch.bfloat16, True),
    "NF4, residual stream in bf16": ({}, "nf4", torch.bfloat16, False),
    "int8": ({}, "int8", torch.float32, False),
    "DoRA on NF4": ({"use_dora": True}, "nf4", torch.float32, False),
}


def every(*quick):
    """The kinds; all but the quick ones are slow, four trainings each."""
    return [pytest.param(kind, marks=() if kind in quick else pytest.mark.slow) for kind in KINDS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """dtype -> a folder with the tiny model in it."""
    folder = tmp_path_factory.mktemp("models")
    for dtype in (torch.float32, torch.bfloat16):
        tiny.model(dtype=dtype).save_pretrained(folder / str(dtype))
    return folder


def build(folders, kind, *, random_b):
    lora, quantization, dtype, prepared = KINDS[kind]
    options = {}
    if quantization:
        pytest.importorskip("bitsandbytes")
        options = {"quantization_config": quantization_config(quantization, dtype), "device_map": {"": "cpu"}}
    base = AutoModelForCausalLM.from_pretrained(folders / str(dtype), dtype="auto", **options)
    if prepared:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    torch.manual_seed(3)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **lora))
    for name, parameter in model.named_parameters():
        if random_b and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def eager_loss(model, batch, penalty):
    """As people write it, on the hidden states that the model has, with the penalty itself in fp64."""
    sae, layer = tiny.sae(), penalty.layer
    with torch.no_grad(), model.disable_adapter():
        reference = model(**batch, output_hidden_states=True).hidden_states[layer + 1].double()
    output = model(**batch, output_hidden_states=True)
    hidden = output.hidden_states[layer + 1]
    weight, bias = sae.weight.to(hidden.dtype).double(), sae.bias.double()
    z, z_ref = (hidden.double() @ weight.T + bias).relu(), (reference @ weight.T + bias).relu()
    up = (z - z_ref)[..., list(penalty.latents.positive)].relu().square().sum(-1)
    down = (z_ref - z)[..., list(penalty.latents.negative)].relu().square().sum(-1)
    block = (up + down)[batch["labels"] != IGNORED].sum() / (batch["labels"][:, 1:] != IGNORED).sum()
    return output.loss, block, hidden.dtype


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_the_gradients_are_the_eager_ones(tmp_path, folders, rows, kind):  # noqa: F811
    batch = PaddingCollator(0)([rows[i] for i in range(8)])
    penalty = tiny.penalty(5e5 if "DoRA" in kind else 500.0)  # the row lengths of DoRA hold the latents back

    def gradients(model, loss):
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    model = build(folders, kind, random_b=True).train()
    sft, block, dtype = eager_loss(model, batch, penalty)
    assert dtype == (torch.bfloat16 if "bf16" in kind else torch.float32)
    expected = gradients(model, sft + penalty.weight * block)
    trainer = make(BlockTrainer, tmp_path, model, rows, penalty=penalty)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(model, dict(batch))
    found = gradients(model, loss)
    assert loss.item() == pytest.approx((sft + penalty.weight * block).item(), rel=1e-5)
    assert penalty.weight * block > 0.1 * sft, "the penalty is too small for this test to see it"
    # The gradient of the hidden state is rounded to its dtype, in two tensors in one case and in one in the other.
    allowed = 8 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else rounding(rows)
    for name, exact in expected.items():
        assert (found[name] - exact).abs().max() <= allowed * exact.abs().max(), name


def rounding_of(kind, rows):  # noqa: F811
    """By how much three steps may differ in relation, where products of other shapes add in another order."""
    step = None
    if "bf16" in kind:
        step = torch.finfo(torch.bfloat16).eps
    elif kind == "int8" and not hasattr(import_module("bitsandbytes.autograd._functions"), "MatMul8bitFp"):
        step = 1 / 127  # older versions round the activations to 8 bits too, in training on a CPU
    return rounding(rows) if step is None else 3 * tiny.LAYERS * step


@pytest.mark.parametrize("kind", every("DoRA", "NF4, residual stream in bf16"))
def test_the_first_penalty_is_exactly_zero_and_lambda_knows_no_micro_batch(tmp_path, folders, rows, kind):  # noqa: F811
    def train(micro, random_b):
        model = build(folders, kind, random_b=random_b)
        trainer = make(
            BlockTrainer, tmp_path, model, rows, penalty=tiny.penalty(500.0), optim="sgd", learning_rate=0.1,
            per_device_train_batch_size=micro, gradient_accumulation_steps=8 // micro,
        )  # fmt: skip
        before = adapter(trainer)
        trainer.train()
        moved = largest_difference(before, adapter(trainer))
        return adapter(trainer), moved, history(trainer, "block_penalty")

    _, _, penalty = train(8, False)
    assert penalty[0] == 0.0 < penalty[-1]
    whole, moved, penalty = train(8, True)
    allowed = rounding_of(kind, rows)
    for micro in (4, 2):
        split, _, split_penalty = train(micro, True)
        assert largest_difference(whole, split) <= allowed * moved
        assert split_penalty == pytest.approx(penalty, rel=allowed) and penalty[0] > 0
