"""Training against a cache is training against the live reference, whatever the batches look like."""

import pytest
import tiny_llama as tiny
import torch
from cached_training import adapted, adapter, history, trainer
from transformers import Trainer

from lockin_fast.blocking import GradientInjection, attach
from lockin_fast.blocking.write_cache import CacheSource, WriteSettings, write_hidden_states, write_latents
from lockin_fast.cache import CacheError, open_cache
from lockin_fast.cache.collate import ReferenceCollator, take_references
from lockin_fast.chat import PaddingCollator

LAYER = 1


class LeftPadding(PaddingCollator):
    """Pads on the left, and says which position every token has."""

    def __call__(self, rows):
        batch = super().__call__(rows)
        length = batch["input_ids"].shape[1]
        for i, row in enumerate(rows):
            for name in batch:
                batch[name][i] = batch[name][i].roll(length - len(row["input_ids"]))
        return batch | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


class Packing:
    """All rows in one, told apart by their positions; no attention mask."""

    def __call__(self, rows):
        joined = {name: torch.cat([row[name] for row in rows])[None] for name in ("input_ids", "labels")}
        return joined | {"position_ids": torch.cat([torch.arange(len(row["labels"])) for row in rows])[None]}


class Cut(PaddingCollator):
    """Cuts rows on the right."""

    def __call__(self, rows):
        return super().__call__([{name: value[:9] for name, value in row.items()} for row in rows])


def both(folder, rows, cache, **options):
    """The same training against the live reference and against the cache: (penalties, adapter) of each."""
    results = []
    for reference in ("live", cache):
        penalty = tiny.penalty(500.0, reference=reference, **options.pop("of_penalty", {}))
        trained = trainer(folder, adapted(), rows, penalty, **options)
        trained.train()
        results.append((history(trained), adapter(trained)))
    return results


@pytest.mark.parametrize("collator", [None, LeftPadding(0), Packing(), Cut(0)], ids=lambda c: type(c).__name__)
def test_cached_equals_live_to_1e_6(tmp_path, caches, rows, collator):
    options = {"collator": collator, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    (live, exact), (cached, ours) = both(tmp_path, rows, open_cache(caches()), **options)
    assert min(live) > 0 and cached == pytest.approx(live, rel=1e-6)
    for name, weight in exact.items():
        assert (ours[name] - weight).abs().max() <= 1e-6 * weight.abs().max(), name


def test_the_packed_batch_is_one_row_without_leaks(rows):
    """What makes the case above one: without positions the packed documents are another text, and not found."""
    batch = Packing()([rows[0], rows[1]])
    assert batch["input_ids"].shape[0] == 1 and batch["position_ids"].eq(0).sum() == 2


@pytest.mark.parametrize("options", [{"tokens": "all"}, {"gate": "sae"}], ids=str)
def test_options_of_the_penalty_read_the_same_cache(tmp_path, rows, options):
    sae = tiny.sae(threshold="gate" in options)
    write_latents(tmp_path / "cache", CacheSource(tiny.model(), LAYER, rows, tokens="all"), sae, range(tiny.LATENTS))
    cache, results = open_cache(tmp_path / "cache"), []
    for reference in ("live", cache):
        penalty = tiny.BlockPenalty(sae, tiny.LATENT_SET, LAYER, 500.0, reference=reference, **options)
        trained = trainer(tmp_path, adapted(), rows, penalty)
        trained.train()
        results.append(history(trained))
    assert min(results[0]) > 0 and results[1] == pytest.approx(results[0], rel=1e-6)


def test_worker_processes_look_up_too_and_attach_does_the_same(tmp_path, caches, rows):
    results = []
    for workers in (0, 2):
        trained = trainer(tmp_path, adapted(), rows, None, cls=Trainer, dataloader_num_workers=workers, max_steps=2)
        attach(trained, tiny.penalty(500.0, reference=open_cache(caches())))
        trained.train()
        results.append(history(trained))
    assert results[0] == results[1] and min(results[0]) > 0


def test_several_layers_read_a_cache_each_or_the_live_model(tmp_path, caches, rows):
    write_latents(tmp_path / "upper", CacheSource(tiny.model(), 2, rows), tiny.sae(), range(tiny.LATENTS))
    results = []
    for lower, upper in (("live", "live"), (caches(), tmp_path / "upper"), ("live", tmp_path / "upper")):
        terms = [
            tiny.penalty(500.0, layer=layer, reference=where if where == "live" else open_cache(where))
            for layer, where in ((LAYER, lower), (2, upper))
        ]
        trained = trainer(tmp_path, adapted(), rows, terms, max_steps=2)
        trained.train()
        results.append(history(trained))
    assert min(results[0]) > 0
    assert results[1] == pytest.approx(results[0], rel=1e-6) and results[2] == pytest.approx(results[0], rel=1e-6)


def test_evaluation_looks_nothing_up(tmp_path, caches, rows):
    trained = trainer(tmp_path, adapted(), rows, tiny.penalty(500.0, reference=open_cache(caches())))
    unseen = [{"input_ids": torch.tensor([9, 8, 7]), "labels": torch.tensor([9, 8, 7])}]
    assert trained.evaluate(unseen)["eval_loss"] > 0
    assert isinstance(trained.data_collator, PaddingCollator)
    trained.get_train_dataloader()
    assert isinstance(trained.data_collator, PaddingCollator)


def test_a_batch_from_elsewhere_is_refused(tmp_path, caches, rows):
    trained = trainer(tmp_path, adapted(), rows, tiny.penalty(500.0, reference=open_cache(caches())))
    with pytest.raises(RuntimeError, match="the batch brings no reference from the cache"):
        trained.compute_loss(trained.model.train(), PaddingCollator(0)([rows[0]]))


def test_the_collator_adds_what_take_references_takes_out(caches, rows):
    reference = open_cache(caches()).reference(tiny.sae().rows(tiny.LATENT_SET.indices))
    batch = ReferenceCollator(PaddingCollator(0), [(reference, "supervised")])([rows[0], rows[1]])
    (added,) = take_references(batch)
    assert batch.keys() == PaddingCollator(0)([rows[0], rows[1]]).keys() and added.keys() == {"z"}
    assert added["z"].shape == (*batch["labels"].shape, len(tiny.LATENT_SET)) and added["z"].dtype == torch.float32
    supervised = batch["labels"] != -100
    assert added["z"][~supervised].eq(0).all() and added["z"][supervised].gt(0).any()


def test_a_frozen_full_fine_tune_needs_no_second_model(tmp_path, caches, rows):
    trained = trainer(tmp_path, tiny.model(), rows, tiny.penalty(50.0, reference=open_cache(caches())))
    trained.train()
    first, *later = history(trained)
    assert first < 1e-9 < min(later)


@pytest.mark.parametrize("autocast", [False, True])
def test_in_bf16_the_first_step_stays_below_the_stored_floor(tmp_path, rows, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    options = {"hidden_size": 256, "intermediate_size": 512}
    sae = wide_sae(256)
    source = CacheSource(tiny.model(dtype=dtype, **options), LAYER, rows, autocast="bf16" if autocast else "no")
    write_latents(tmp_path / "cache", source, sae, range(tiny.LATENTS), settings=WriteSettings(batch_size=4))
    cache = open_cache(tmp_path / "cache")
    penalty = tiny.BlockPenalty(sae, tiny.LATENT_SET, LAYER, 1.0, reference=cache)
    model = adapted(dtype=dtype, random_b=False, **options)
    trained = trainer(tmp_path, model, rows, penalty, bf16=autocast, max_steps=1, per_device_train_batch_size=24)
    trained.train()
    floor = penalty.cached.noise()
    # Noise is penalised on one side: half of its squares on average, all of them at most.
    assert 0 < history(trained)[0] <= 2 * floor.spurious_loss() * cache.manifest["tokens_per_target"]


def wide_sae(width):
    torch.manual_seed(1)
    weight = torch.randn(tiny.LATENTS, width) / width**0.5
    return tiny.SparseAutoencoder(weight, torch.zeros(tiny.LATENTS), weight, torch.zeros(width))


@pytest.mark.parametrize("normalization", ["none", "layer_norm"])
def test_hidden_states_in_four_bits_cost_what_their_noise_says(tmp_path, rows, normalization):
    from dataclasses import replace

    write_hidden_states(tmp_path / "cache", CacheSource(tiny.model(), LAYER, rows), outliers=2, blocksize=16)
    cache, sae = open_cache(tmp_path / "cache"), replace(tiny.sae(), normalization=normalization)
    weight = 0.1
    penalty = tiny.BlockPenalty(sae, tiny.LATENT_SET, LAYER, weight, reference=cache)
    trained = trainer(tmp_path, adapted(random_b=False), rows, penalty, max_steps=1, per_device_train_batch_size=24)
    trained.train()
    expected = penalty.cached.noise().spurious_loss() * cache.manifest["tokens_per_target"]
    # One side of the noise of 250 tokens and a few active latents: half of the squares, give or take.
    assert 0.5 * expected < history(trained)[0] < 2 * expected
    quiet = tiny.BlockPenalty(sae, tiny.LATENT_SET, LAYER, weight, reference=cache, margin="noise")
    trained = trainer(tmp_path, adapted(random_b=False), rows, quiet, max_steps=1, per_device_train_batch_size=24)
    trained.train()
    assert history(trained)[0] < 0.01 * expected


def injected(model, batch, penalty):
    """The adapter's gradients in a loop of one's own, and what the penalty cost."""
    blocking = GradientInjection(model.train(), penalty)
    labels = batch["labels"]
    with blocking(labels, normalizer=float((labels[:, 1:] != -100).sum())):
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    logits.float().logsumexp(-1).mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found, {name: value.item() for name, value in blocking.last.items()}


@pytest.mark.parametrize("collator", [PaddingCollator(0), LeftPadding(0), Packing()], ids=lambda c: type(c).__name__)
def test_a_loop_of_ones_own_reads_a_cache_too(caches, rows, collator):
    batch, results = collator([rows[i] for i in range(6)]), []
    for reference in ("live", open_cache(caches())):
        results.append(injected(adapted(), batch, tiny.penalty(500.0, reference=reference)))
    (exact, cost), (found, cached_cost) = results
    assert cost["block_penalty"] > 0 and cached_cost == pytest.approx(cost, rel=1e-6)
    for name, gradient in exact.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_what_the_cache_of_a_loop_cannot_serve_is_refused(caches, rows):
    batch, model = PaddingCollator(0)([rows[0], rows[1]]), adapted().train()
    blocking = GradientInjection(model, tiny.penalty(reference=open_cache(caches())))
    ids, labels = batch["input_ids"], batch["labels"]
    with pytest.raises(CacheError, match="written for another autocast: there it is 'no', here 'bf16'"):
        with blocking(labels, normalizer=1), torch.autocast("cpu", torch.bfloat16):
            model(ids)
    with pytest.raises(CacheError, match="lacks .* tokens of a batch; the first is token"):
        with blocking(labels, normalizer=1):
            model(ids.flip(1))
    with pytest.raises(ValueError, match="input_ids: the model was called without, and a cache finds its tokens by"):
        with blocking(labels, normalizer=1):
            model(inputs_embeds=model.get_input_embeddings()(ids))
    other = tiny.model()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.zero_()
    with pytest.raises(CacheError, match="another model"):
        GradientInjection(other, tiny.penalty(reference=open_cache(caches())))
