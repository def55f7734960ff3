"""Prefix-matching scores of whole models, against the attention matrices that eager attention returns."""

import sys

import pytest
import torch
from attention_models import ARCHITECTURES, INDUCTION_HEAD, PLACES, WORDS, build, induction_model
from memory import printed
from transformers import BloomConfig, BloomForCausalLM

from lockin_fast.patching.heads import attention_calls, run_decoder, watched_attention
from lockin_fast.patching.induction import flagged, over_seeds, prefix_scores, repeated_tokens


def test_repeated_tokens():
    pool = torch.arange(100, 140)
    clean, corrupt = repeated_tokens(pool, 10, 6, seed=3, start=7)
    assert clean.shape == corrupt.shape == (6, 21) and (clean[:, 0] == 7).all() and (corrupt[:, 0] == 7).all()
    first, second = clean[:, 1:].split(10, 1)
    assert torch.equal(first, second) and torch.equal(corrupt[:, 11:], second)
    assert all(len(set(row.tolist())) == 21 for row in corrupt)  # nothing occurs twice in a corrupted row
    assert set(clean[:, 1:].flatten().tolist()) <= set(pool.tolist()) and len(clean.unique(dim=0)) == 6
    assert torch.equal(repeated_tokens(pool, 10, 6, seed=3, start=7)[0], clean)
    assert not torch.equal(repeated_tokens(pool, 10, 6, seed=4, start=7)[0], clean)
    assert repeated_tokens(pool, 10, 2, seed=3)[0].shape == (2, 20)
    for length in (1, 21):
        with pytest.raises(ValueError, match=rf"^length: got {length} tokens a copy, expected 2 to 20"):
            repeated_tokens(pool, length, 1, seed=0)


def stripe_means(model, tokens, length):
    """[N, layers, H] from the eager attention matrices: the mean of the stripe from t to t - (S - 1), second copy."""
    attentions = model(input_ids=tokens, output_attentions=True, use_cache=False).attentions
    found = [layer.double().diagonal(1 - length, dim1=-2, dim2=-1)[..., -length:].mean(-1) for layer in attentions]
    return torch.stack(found, 1)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.no_grad()
def test_equals_the_attention_matrices(kind):
    tokens, _ = repeated_tokens(torch.arange(3, 60), 20, 3, seed=1, start=1)
    model, eager = build(kind), build(kind, attention="eager")
    with torch.no_grad():
        truth = stripe_means(eager.double(), tokens, 20)
        yardstick = (stripe_means(eager.float(), tokens, 20) - truth).abs().max()
    scores = prefix_scores(model, tokens, batch_size=2)
    assert scores.shape == truth.shape and scores.dtype is torch.float32
    assert truth.std() > 0.1 * truth.mean()  # heads differ, or the test could not fail
    eps = torch.finfo(torch.float32).eps
    assert (scores - truth).abs().max() <= 2 * yardstick + 4 * eps


def test_a_head_built_for_it_scores_one():
    model = induction_model()
    # Position 0 has nothing before it, so its previous-token head finds itself; a start token takes that place.
    tokens, corrupt = repeated_tokens(torch.arange(1, WORDS), 5, 8, seed=0, start=0)
    assert tokens.shape[1] <= PLACES
    scores = prefix_scores(model, tokens).mean(0)
    assert scores[INDUCTION_HEAD] > 0.99
    others = torch.ones_like(scores, dtype=torch.bool)
    others[INDUCTION_HEAD] = False
    assert scores[others].max() < 0.2
    assert prefix_scores(model, corrupt).isnan().all()  # no token of it occurs twice


def test_flagged_heads_are_nested_and_seeds_are_averaged():
    scores = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    chosen = flagged(scores, [0.0, 0.2, 0.5, 0.9, 1.1])
    assert chosen[0].all() and not chosen[-1].any()
    assert all((low | ~high).all() for low, high in zip(chosen, chosen[1:], strict=False))
    made = torch.Generator().manual_seed(1)
    means = torch.rand(3, 3, 4, generator=made, dtype=torch.float64)
    found = over_seeds(means)
    torch.testing.assert_close(found.mean, means.mean(0))
    torch.testing.assert_close(found.error, ((means - means.mean(0)) ** 2).sum(0).div(2).sqrt() / 3**0.5)
    assert over_seeds(means[:1]).error.isnan().all()


@pytest.mark.parametrize(
    ("kind", "options", "attention", "reason"),
    [
        ("gemma2", {"query_pre_attn_scalar": 8}, "eager", "soft-caps its logits"),
        ("mistral", {"sliding_window": 41}, "sdpa", "sees only the last 41 of 41 tokens"),
        ("gemma3_text", {"sliding_window": 9}, "sdpa", "sees only the last 9 of 41 tokens"),
        ("llama", {}, "eager", r"is eager \(load it with attn_implementation='sdpa'\)"),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "eager", "has attention sinks"),
    ],
)
def test_what_the_op_cannot_express_is_refused(kind, options, attention, reason):
    tokens, _ = repeated_tokens(torch.arange(3, 60), 20, 1, seed=1, start=1)
    with pytest.raises(ValueError, match=rf"^model: the attention of layer \d \(\w+\) {reason}, so prefix matching"):
        prefix_scores(build(kind, attention=attention, **options), tokens)


def test_models_whose_attention_cannot_be_watched_are_refused_by_name():
    bloom = BloomForCausalLM(BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(ValueError, match="^model: BloomForCausalLM computes the attention of 2 of its 2 layers"):
        prefix_scores(bloom, torch.tensor([[5, 6, 5, 6]]))
    with pytest.raises(ValueError, match="^tokens: sequences of 130 tokens, but LlamaForCausalLM has 128 positions"):
        prefix_scores(build("llama"), torch.zeros(1, 130, dtype=torch.int64))


def test_watching_changes_nothing_and_leaves_nothing_behind():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, other = build("llama"), build("llama", seed=1)
    tokens = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    before = dict(ALL_ATTENTION_FUNCTIONS)
    plain = run_decoder(model, tokens)
    seen, inner = [], []
    model.train()
    with watched_attention(model, lambda call, output: seen.append(call.layer)):
        with watched_attention(model, lambda call, output: inner.append(call.layer)):
            assert torch.equal(run_decoder(model, tokens), plain)
        run_decoder(other, tokens)
        run_decoder(model, tokens)
    assert seen == [0, 1, 0, 1] and inner == [0, 1]
    assert all(module.training for module in model.modules())
    assert dict(ALL_ATTENTION_FUNCTIONS) == before
    with pytest.raises(KeyError), watched_attention(model, lambda call, output: {}["nothing"]):
        run_decoder(model, tokens)
    assert dict(ALL_ATTENTION_FUNCTIONS) == before


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_heads_as_they_are_read(kind):
    model = build(kind)
    call = attention_calls(model)[1]
    assert call.layer == 1 and call.query.shape == (1, 4, 2, 8)
    seen = []
    with watched_attention(model, lambda call, output: seen.append((call.value, output))):
        run_decoder(model, torch.tensor([[4, 5, 6]]))
    for value, output in seen:  # the first position sees itself alone: its heads' outputs are its values
        assert output.shape == (1, 3, 4, 8)
        torch.testing.assert_close(output[:, 0], value[:, :, 0].repeat_interleave(4 // value.shape[1], 1))


def test_what_is_given_back_takes_the_place_of_the_heads_outputs():
    model = build("llama")
    tokens = torch.tensor([[4, 5, 6]])
    with watched_attention(model, lambda call, output: torch.zeros_like(output) if call.layer == 1 else None):
        without = run_decoder(model, tokens)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    assert torch.equal(run_decoder(model, tokens), without)


def test_adapters_are_part_of_the_model():
    from peft import LoraConfig, get_peft_model

    tokens, _ = repeated_tokens(torch.arange(3, 60), 20, 2, seed=1)
    plain = prefix_scores(build("llama"), tokens)
    adapted = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    scores = prefix_scores(adapted, tokens)
    merged = prefix_scores(adapted.merge_and_unload(), tokens)
    assert not torch.allclose(scores, plain, atol=1e-3)
    torch.testing.assert_close(scores, merged, rtol=1e-4, atol=1e-5)


MEMORY = """
from transformers import LlamaConfig, LlamaForCausalLM
from lockin_fast.patching.induction import prefix_scores, repeated_tokens
torch.set_num_threads(1)
config = LlamaConfig(vocab_size=2100, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=2048)
model = LlamaForCausalLM(config).eval()
tokens, _ = repeated_tokens(torch.arange(2100), 1024, 1, seed=0)
prefix_scores(model, tokens[:, :256])
scores, risen = rise(lambda: prefix_scores(model, tokens))
print(risen, scores.shape[1], scores.isfinite().all().item())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_memory_at_2048_tokens_stays_below_one_attention_matrix():
    megabytes, layers, finite = printed(MEMORY, OMP_NUM_THREADS="1")
    one_head = 4 * 2048**2 / 2**20  # of the eight
    assert (layers, finite) == ("2", "True")
    assert float(megabytes) < one_head
