"""Routers of tiny models read by hooks, against loops over tokens; figures and warnings by hand."""

import importlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_llama
import torch
from tiny_mixtures import CHOSEN, EXPERTS, LAYERS, OPTIONS, SIGMOID, SPARSE, model

from lockin_fast.lockin.routing import KINDS, RoutingReader
from lockin_fast.lockin.routing_figures import (
    LEAST_EXPECTED,
    LayerRouting,
    routing_metrics,
    routing_rows,
    routing_warnings,
)
from lockin_fast.ops.routing_stats import RoutingStats

IDS = torch.randint(3, 48, (4, 9), generator=torch.Generator().manual_seed(1))
FOLDERS = {
    "Mixtral": "mixtral", "Qwen2Moe": "qwen2_moe", "Qwen3Moe": "qwen3_moe", "Qwen3Next": "qwen3_next",
    "Qwen3_5Moe": "qwen3_5_moe", "Qwen3VLMoeText": "qwen3_vl_moe", "Olmoe": "olmoe", "FlexOlmo": "flex_olmo",
    "GptOss": "gpt_oss", "DeepseekV3": "deepseek_v3", "DeepseekV32": "deepseek_v32", "Glm4Moe": "glm4_moe",
    "Glm4MoeLite": "glm4_moe_lite", "Glm4vMoeText": "glm4v_moe", "GlmMoeDsa": "glm_moe_dsa", "Dots1": "dots1",
}  # fmt: skip
MASK = torch.ones(4, 9, dtype=torch.bool)
MASK[0, :4] = MASK[2, :1] = False  # left padding
CLASSES = torch.tensor([0, 2, -1, 0])


def read(network, **options):
    reader = RoutingReader(network, num_classes=options.pop("num_classes", 0))
    with torch.no_grad(), reader.reading(MASK, **options):
        network(input_ids=IDS, attention_mask=MASK.long())
    return reader.layers


def gates(network):
    return {
        layer: module
        for layer, decoder in enumerate(network.model.layers)
        for module in decoder.modules()
        if type(module).__name__.lower().endswith("topkrouter")
    }


def raw_logits(network):
    """[T, E] fp64 of every layer: what enters the router times its weight."""
    seen = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, layer=layer: seen.update({layer: args[0].reshape(-1, 32)}))
        for layer, module in gates(network).items()
    ]
    with torch.no_grad():
        network(input_ids=IDS, attention_mask=MASK.long())
    for handle in handles:
        handle.remove()
    bias = {layer: getattr(module, "bias", None) for layer, module in gates(network).items()}
    return {
        layer: (x.double() @ gates(network)[layer].weight.T.double() + (0 if bias[layer] is None else bias[layer]))
        .detach()
        .cpu()
        .numpy()
        for layer, x in seen.items()
    }


def chosen(x, family, gate):
    """The experts that one token with logits x is sent to."""
    if family not in SIGMOID:
        return np.argsort(-x)[:CHOSEN]
    score = 1 / (1 + np.exp(-x)) + gate.e_score_correction_bias.double().cpu().numpy()
    groups = score.reshape(gate.num_group, -1)
    best = np.argsort(-np.sort(groups, 1)[:, -2:].sum(1))[: gate.topk_group]
    allowed = np.isin(np.arange(EXPERTS) // groups.shape[1], best)
    return np.argsort(-np.where(allowed, score, -np.inf))[:CHOSEN]


def entropy(p):
    return -sum(x * math.log(x) for x in p if x > 0)


@pytest.mark.parametrize("family", OPTIONS)
def test_every_family_against_a_loop_over_tokens(family):
    network = model(family)
    layers = read(network, num_classes=3, classes=CLASSES)
    logits = raw_logits(network)
    assert list(layers) == list(logits) == SPARSE.get(family, list(range(LAYERS)))
    rows = CLASSES[:, None].expand_as(MASK).flatten().tolist()
    for layer, found in layers.items():
        p, counts, squares = [], np.zeros((4, EXPERTS), dtype=int), []
        for x, counted, label in zip(logits[layer], MASK.flatten(), rows, strict=True):
            if counted:
                weight = 1 / (1 + np.exp(-x)) if family in SIGMOID else np.exp(x)
                p.append(weight / weight.sum())
                squares.append(math.log(np.exp(x).sum()) ** 2)
                counts[label, chosen(x, family, gates(network)[layer])] += 1
        p = np.array(p)
        each = [entropy(row) for row in p]
        assert found.router == ("sigmoid" if family in SIGMOID else "softmax") and found.top_k == CHOSEN
        assert found.stats.tokens == MASK.sum() == len(p)
        assert found.stats.counts.tolist() == counts.sum(0).tolist()
        assert found.stats.class_counts.tolist() == counts[:3].tolist()
        # fp32 logits of 32 products up to a few units: 1e-5 is a hundred times their error.
        assert found.stats.entropy.item() == pytest.approx(np.mean(each) / math.log(EXPERTS), abs=1e-5)
        information = entropy(p.mean(0)) - np.mean(each)
        assert found.stats.mutual_information.item() == pytest.approx(information, abs=1e-5)
        load = counts.sum(0) / counts.sum()
        assert found.balance_loss.item() == pytest.approx(EXPERTS * load @ p.mean(0), abs=1e-5)
        assert found.max_load == load.max()
        expected = None if family in SIGMOID else pytest.approx(np.mean(squares), rel=1e-5)
        assert found.z_loss == expected
        assert 0 <= found.stats.entropy <= 1 and 0 <= information <= math.log(EXPERTS)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "Olmoe", "GptOss"])
def test_balance_loss_is_that_of_transformers(family):
    network = model(family)
    layers = read(network)
    module = importlib.import_module(type(network).__module__)
    with torch.no_grad():
        logits = network(input_ids=IDS, attention_mask=MASK.long(), output_router_logits=True).router_logits
    theirs = module.load_balancing_loss_func(logits, EXPERTS, CHOSEN, MASK.long())
    assert sum(layers.values()).balance_loss.item() * CHOSEN == pytest.approx(theirs.item(), rel=1e-5)
    first = module.load_balancing_loss_func(logits[:1], EXPERTS, CHOSEN, MASK.long())
    assert layers[0].balance_loss.item() * CHOSEN == pytest.approx(first.item(), rel=1e-5)


@pytest.mark.parametrize("rule, family", [(rule, family) for rule, names in KINDS.items() for family in names])
def test_every_known_router_follows_its_rule(rule, family):
    """Its weights of the chosen experts are in the ratio of the probabilities that the rule makes of its logits."""
    name = FOLDERS[family]
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    router = next(getattr(module, key) for key in dir(module) if key.lower() == f"{family}TopKRouter".lower())
    config = SimpleNamespace(
        num_experts_per_tok=2, num_experts=6, num_local_experts=6, hidden_size=8, norm_topk_prob=True, n_group=1,
        topk_group=1, routed_scaling_factor=2.5,
    )  # fmt: skip
    made = router(config)
    torch.nn.init.normal_(made.weight)
    with torch.no_grad():
        logits, weights, indices = made(torch.randn(50, 8))
    p = logits.double().sigmoid() if rule == "sigmoid" else logits.double().softmax(1)
    p = p.gather(1, indices)
    ratio = (weights[:, 0] / weights[:, 1]).double()
    assert torch.allclose(ratio, p[:, 0] / p[:, 1], rtol=1e-4)
    assert logits.min() < 0  # raw, not probabilities


def test_batches_add_up_and_a_failed_forward_adds_nothing():
    network = model("Qwen3Moe")
    whole, reader = read(network), RoutingReader(network)
    with torch.no_grad():
        for part in (slice(0, 1), slice(1, 4)):
            with reader.reading(MASK[part]):
                network(input_ids=IDS[part], attention_mask=MASK[part].long())
        before = dict(reader.layers)
        with pytest.raises(RuntimeError, match="stop"), reader.reading(MASK):
            network(input_ids=IDS, attention_mask=MASK.long())
            raise RuntimeError("stop")
        assert reader.layers == before
        network(input_ids=IDS)  # outside of any reading: nothing looks
    assert reader.layers == before
    for layer, found in reader.layers.items():
        assert torch.equal(found.stats.counts, whole[layer].stats.counts)
        assert found.stats.entropy.item() == pytest.approx(whole[layer].stats.entropy.item(), abs=1e-6)
        assert found.z_loss == pytest.approx(whole[layer].z_loss, rel=1e-6)
    assert not any(module._forward_hooks for module in gates(network).values())


def test_a_trained_copy_beside_the_original_is_the_one_that_counts():
    peft = pytest.importorskip("peft")
    network = model("Mixtral")
    expected = read(network)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gate"])
    adapted = peft.get_peft_model(network, config).eval()
    same = read(adapted)
    assert all(torch.equal(same[layer].stats.counts, expected[layer].stats.counts) for layer in expected)
    for name, value in adapted.named_parameters():
        if "gate.modules_to_save" in name:
            torch.nn.init.normal_(value)
    assert not torch.equal(read(adapted)[0].stats.probability, expected[0].stats.probability)


def routing(load, top_k=1, tokens=1000, router="softmax", p=None):
    """A layer with so many assignments for each expert."""
    counts = torch.tensor(load)
    p = counts.double() / counts.sum() if p is None else torch.tensor(p, dtype=torch.float64)
    total = torch.tensor(tokens)
    zero = torch.zeros((), dtype=torch.float64)
    stats = RoutingStats(p * tokens, zero, counts, counts.new_zeros(0, len(load)), total)
    return LayerRouting(router, top_k, stats, zero + 4 * tokens)


def test_figures_by_hand():
    layer = routing([600, 200, 200, 0], p=[0.4, 0.2, 0.3, 0.1])
    assert layer.balance_loss.item() == pytest.approx(4 * (0.24 + 0.04 + 0.06)) and layer.max_load == 0.6
    assert layer.z_loss == 4 and routing([1, 1], router="sigmoid").z_loss is None
    assert routing([250] * 4).balance_loss == 1 and routing([1000, 0, 0, 0]).balance_loss == 4
    metrics = routing_metrics({3: layer, 5: routing([1000, 0, 0, 0])})
    information = entropy([0.4, 0.2, 0.3, 0.1]) / 2
    assert metrics == {
        "routing_entropy": 0, "routing_information": pytest.approx(information), "routing_max_load": 1
    }  # fmt: skip
    (row,) = routing_rows({3: layer})
    assert row["load"] == [0.6, 0.2, 0.2, 0] and row["layer"] == 3 and row["class_mutual_information"] is None
    assert (row["tokens"], row["experts"], row["top_k"], row["z_loss"]) == (1000, 4, 1, 4)


def test_warnings_by_hand():
    def kinds(layer, **options):
        return [(found.kind, found.experts) for found in routing_warnings({0: layer}, **options)]

    assert kinds(routing([250] * 4)) == []
    # The busiest may take 3/4 beyond its quarter: 0.925 is 90% of it.
    assert kinds(routing([925, 25, 25, 25])) == [("collapsed", (0,))]
    assert kinds(routing([924, 26, 25, 25])) == []
    assert kinds(routing([24, 300, 300, 376])) == [("under-used", (0,))]
    assert kinds(routing([25, 300, 300, 375])) == []
    assert kinds(routing([25, 300, 300, 375]), underused=0.2) == [("under-used", (0,))]
    assert kinds(routing([0, 1000, 0, 1000], top_k=2)) == [("collapsed", (1, 3)), ("under-used", (0, 2))]
    assert kinds(routing([1000] * 3, top_k=3)) == []
    few = LEAST_EXPECTED * 4 - 1
    assert kinds(routing([few, 0, 0, 0], tokens=few)) == [("too few tokens", ())]
    assert kinds(routing([few + 1, 0, 0, 0], tokens=few + 1))[0] == ("collapsed", (0,))
    for name in ("collapse", "underused"):
        with pytest.raises(ValueError, match=f"{name}: got 0"):
            routing_warnings({0: routing([1, 1])}, **{name: 0})


def test_a_router_without_a_preference_has_entropy_one_and_no_information():
    network = model("Olmoe")
    for gate in gates(network).values():
        torch.nn.init.zeros_(gate.weight)
    metrics = routing_metrics(read(network))
    assert metrics["routing_entropy"] == pytest.approx(1, abs=1e-6)
    assert metrics["routing_information"] == pytest.approx(0, abs=1e-6)


def test_a_collapsed_router_is_named():
    network = model("GptOss")
    gates(network)[1].bias.data.copy_(torch.tensor([50.0, 0, 0, 0, 50.0, 0, 0, 0]))
    ids = IDS.repeat(3, 1)  # so that an equal load is 27 assignments an expert
    reader = RoutingReader(network)
    with torch.no_grad(), reader.reading(torch.ones_like(ids, dtype=torch.bool)):
        network(input_ids=ids)
    found = routing_warnings(reader.layers)
    assert [(w.layer, w.experts) for w in found if w.kind == "collapsed"] == [(1, (0, 4))]
    assert (1, (1, 2, 3, 5, 6, 7)) in [(w.layer, w.experts) for w in found if w.kind == "under-used"]
    assert routing_metrics(reader.layers)["routing_max_load"] == 0.5


def test_models_without_known_routers_are_refused():
    with pytest.raises(ValueError, match="is dense: it has no router in any of its 3 layers"):
        RoutingReader(tiny_llama.model())
    network = model("Mixtral")

    class OtherRouter(torch.nn.Module):
        pass

    network.model.layers[1].mlp.gate = OtherRouter()
    with pytest.raises(ValueError, match="a router of class OtherRouter; .* known of these families only: Mixtral"):
        RoutingReader(network)
    for layer in network.model.layers:
        layer.mlp.gate = torch.nn.Linear(32, EXPERTS)
    with pytest.raises(ValueError, match="8 experts, but no router module"):
        RoutingReader(network)


def test_what_is_not_one_forward_of_the_tokens_is_refused():
    network = model("Qwen3Moe")
    reader = RoutingReader(network)
    with torch.no_grad():
        words = "mask: 27 tokens, but the router of layer 0 saw 36"
        with pytest.raises(ValueError, match=words), reader.reading(MASK[:3]):
            network(input_ids=IDS)
        with pytest.raises(RuntimeError, match="layer 0: its router ran twice"), reader.reading(MASK):
            network(input_ids=IDS)
            network(input_ids=IDS)
        with pytest.raises(RuntimeError, match=r"layers \[0, 1, 2\] did not run"), reader.reading(MASK):
            pass
    assert reader.layers == {} and not any(gate._forward_hooks for gate in gates(network).values())
    for call in (routing_metrics, routing_rows, routing_warnings):
        with pytest.raises(ValueError, match="nothing was read"):
            call(reader.layers)


@pytest.mark.parametrize(
    "output, words",
    [
        (lambda x, w, i: x, "returned Tensor, expected"),
        (lambda x, w, i: (x.softmax(-1), w, i), "returned probabilities as its logits"),
    ],
)
def test_other_outputs_of_a_router_are_refused(output, words):
    network = model("Qwen3Moe")
    reader = RoutingReader(network)
    gates(network)[0].register_forward_hook(lambda module, args, given: output(*given))
    with torch.no_grad(), pytest.raises(RuntimeError, match=words), reader.reading(MASK):
        network(input_ids=IDS)


def test_masks_and_classes_are_checked_before_the_forward():
    network = model("Qwen3Moe")
    plain, by_class = RoutingReader(network), RoutingReader(network, num_classes=2)
    with pytest.raises(ValueError, match="num_classes: got -1"):
        RoutingReader(network, num_classes=-1)
    whole = torch.zeros(4, 9, dtype=torch.int64)
    cases = [
        (plain, MASK.long(), None, "mask: got torch.int64"),
        (plain, MASK[0], None, r"mask: got torch.bool \[9\]"),
        (plain, ~MASK & MASK, None, "a token that counts"),
        (plain, None, None, "mask: got NoneType"),
        (plain, MASK, whole, "classes: got some, expected classes of 0 kinds"),
        (by_class, MASK, None, "classes: got none, expected classes of 2 kinds"),
        (by_class, MASK, whole[:, :3], r"classes: got \[4, 3\], expected \[4\] or \[4, 9\]"),
        (by_class, MASK, whole + 2, "int64 from -1 to 1"),
        (by_class, MASK, whole.float(), "got torch.float32"),
    ]
    for reader, mask, classes, words in cases:
        with pytest.raises(ValueError, match=words), reader.reading(mask, classes):
            raise AssertionError("the forward was reached")
    with torch.no_grad(), by_class.reading(MASK, whole):
        network(input_ids=IDS)


def test_stats_of_different_routers_do_not_merge():
    with pytest.raises(ValueError, match="cannot merge a softmax router of top 1 with a sigmoid router of top 1"):
        routing([1, 1]) + routing([1, 1], router="sigmoid")
    with pytest.raises(TypeError):
        routing([1, 1]) + 1
    assert sum([routing([1, 3]), routing([3, 1])]).stats.counts.tolist() == [4, 4]
