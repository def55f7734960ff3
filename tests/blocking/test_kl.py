"""The KL penalty: against torch's own in fp64, in bounded memory, normalised as the trainer normalises its loss."""

import pytest
import tiny_llama as tiny
import torch
from peft import LoraConfig, get_peft_model
from test_trainer import adapted, adapter, history, largest_difference, make, rounding
from torch.nn.functional import kl_div

from lockin_fast.blocking import BlockTrainer, KLPenalty
from lockin_fast.blocking.kl import kl_divergence
from lockin_fast.chat import ChatDataset, PaddingCollator

DIRECTIONS = ("model_to_base", "base_to_model")


@pytest.fixture(scope="module")
def rows():
    return ChatDataset(tiny.conversations(24), tiny.tokenizer())


def operands(tokens=13, width=9, vocabulary=31, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    h, h_ref, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((tokens, width), (tokens, width), (vocabulary, width), (vocabulary,))
    )
    return h.to(dtype).requires_grad_(), h_ref.to(dtype), weight.to(dtype), bias.to(dtype)


def eager(h, h_ref, weight, bias, direction, softcap=None):
    def log_probabilities(x):
        logits = x @ weight.T + (0 if bias is None else bias)
        return (logits if softcap is None else softcap * (logits / softcap).tanh()).log_softmax(-1)

    p, q = log_probabilities(h), log_probabilities(h_ref)
    # kl_div(input, target) is KL(target || input)
    log_input, log_target = (q, p) if direction == "model_to_base" else (p, q)
    return kl_div(log_input, log_target, reduction="sum", log_target=True)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("softcap", "biased"), [(None, True), (3.0, False)])
@pytest.mark.parametrize("chunk", [1, 5, 13, None])
def test_value_and_gradient_are_torchs_own(direction, softcap, biased, chunk):
    h, h_ref, weight, bias = operands()
    bias = bias if biased else None
    ours = kl_divergence(h, h_ref, weight, bias, direction=direction, softcap=softcap, chunk=chunk)
    (gradient,) = torch.autograd.grad(ours, h)
    truth = eager(h, h_ref, weight, bias, direction, softcap)
    (expected,) = torch.autograd.grad(truth, h)
    eps = torch.finfo(torch.float64).eps
    assert (ours - truth).abs() <= 64 * eps * 13 * 31 * truth and truth > 1
    assert (gradient - expected).abs().max() <= 64 * eps * 31 * expected.abs().max()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_as_good_as_torchs(direction, dtype):
    h, h_ref, weight, bias = operands(dtype=dtype)
    exact = [x.detach().double() for x in (h, h_ref, weight, bias)]
    exact[0].requires_grad_()
    truth = eager(*exact, direction)
    (true_gradient,) = torch.autograd.grad(truth, exact[0])
    plain = eager(h, h_ref, weight, bias, direction)
    (plain_gradient,) = torch.autograd.grad(plain, h)
    ours = kl_divergence(h, h_ref, weight, bias, direction=direction, chunk=4)
    (gradient,) = torch.autograd.grad(ours, h)
    eps = torch.finfo(dtype).eps
    assert ours.dtype == torch.float32 and gradient.dtype == dtype
    assert abs(ours - truth) <= 2 * abs(plain - truth) + 4 * eps * truth
    allowed = 2 * (plain_gradient - true_gradient).abs().max() + 4 * eps * true_gradient.abs().max()
    assert (gradient - true_gradient).abs().max() <= allowed


def test_equal_states_cost_nothing_and_no_token_is_no_error():
    h, _, weight, bias = operands(dtype=torch.float32)
    total = kl_divergence(h, h.detach().clone(), weight, bias)
    (gradient,) = torch.autograd.grad(total, h)
    assert total == 0.0 and not gradient.any()
    nothing = kl_divergence(h[:0], h[:0].detach(), weight, bias)
    assert nothing == 0.0
    (gradient,) = torch.autograd.grad(nothing, h)
    assert not gradient.any()
    with torch.no_grad():
        h[3, 0] = float("nan")
    assert kl_divergence(h, h.detach().clone(), weight, bias).isnan()


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements of the largest tensor any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.numel() and not tensor._is_view():
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_is_larger_than_a_chunk_of_logits():
    tokens, width, vocabulary, chunk = 64, 4, 100, 8
    h, h_ref, weight, bias = operands(tokens, width, vocabulary, torch.float32)
    with LargestTensor() as seen:
        kl_divergence(h, h_ref, weight, bias, chunk=chunk).backward()
    assert seen.elements == chunk * vocabulary
    with LargestTensor() as seen:
        eager(h, h_ref, weight, bias, "model_to_base").backward()
    assert seen.elements == tokens * vocabulary, "the measure does not see what it should"


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_trainers_loss_is_the_eager_one(tmp_path, rows, direction):
    batch = PaddingCollator(0)([rows[i] for i in range(8)])
    model = adapted(random_b=True).train()
    output = model(**batch)
    with torch.no_grad(), model.disable_adapter():
        base = model(**batch).logits
    predicts = batch["labels"][:, 1:] != -100
    p, q = (logits[:, :-1][predicts].double().log_softmax(-1) for logits in (output.logits, base))
    expected = (p.exp() * (p - q) if direction == "model_to_base" else q.exp() * (q - p)).sum(-1).mean()
    trainer = make(BlockTrainer, tmp_path, model, rows, penalty=KLPenalty(model, 200.0, direction=direction))
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(model, dict(batch))
    assert loss.item() == pytest.approx((output.loss + 200.0 * expected).item(), rel=rounding(rows))
    assert 200.0 * expected > 0.1 * output.loss


def train(folder, rows, micro, **options):
    model = adapted(random_b=True)
    penalties = [KLPenalty(model, 20.0), tiny.penalty(50.0)]
    trainer = make(
        BlockTrainer, folder, model, rows, penalty=penalties, optim="sgd", learning_rate=0.1,
        per_device_train_batch_size=micro, gradient_accumulation_steps=8 // micro, **options,
    )  # fmt: skip
    before = adapter(trainer)
    trainer.train()
    return trainer, adapter(trainer), largest_difference(before, adapter(trainer))


def test_beside_the_block_penalty_splitting_a_batch_changes_nothing(tmp_path, rows):
    whole, weights, moved = train(tmp_path, rows, 8)
    split, split_weights, _ = train(tmp_path, rows, 2)
    assert largest_difference(weights, split_weights) <= rounding(rows) * moved
    for row in [row for row in whole.state.log_history if "loss" in row]:
        parts = row["sft_loss"] + 20.0 * row["kl"] + 50.0 * row["block_penalty"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5)
        assert (row["lambda_kl"], row["lambda"]) == (20.0, 50.0)
    assert history(split, "kl") == pytest.approx(history(whole, "kl"), rel=rounding(rows))


def test_the_first_step_costs_nothing(tmp_path, rows):
    model = adapted(lora_dropout=0.1)
    trainer = make(BlockTrainer, tmp_path, model, rows, penalty=KLPenalty(model, 1.0), max_steps=2)
    trainer.train()
    assert history(trainer, "kl")[0] == 0.0 < history(trainer, "kl")[1]


def test_what_it_cannot_do_is_refused(tmp_path, rows):
    base = tiny.model()
    with pytest.raises(ValueError, match="weight: got -1.0, expected a finite lambda_KL"):
        KLPenalty(base, -1.0)
    with pytest.raises(ValueError, match="direction: got 'both'"):
        KLPenalty(base, 1.0, direction="both")
    scaled = tiny.model()
    scaled.config.logits_scaling = 8.0
    with pytest.raises(ValueError, match="logits_scaling=8.0, logits that are scaled"):
        KLPenalty(scaled, 1.0)
    penalty = KLPenalty(base, 1.0)
    on_the_head = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="without an adapter on it; got Linear"):
        make(BlockTrainer, tmp_path, on_the_head, rows, penalty=penalty)
    with pytest.raises(ValueError, match="the frozen, unquantised unembedding it was made with"):
        make(BlockTrainer, tmp_path, adapted(), rows, penalty=penalty)
