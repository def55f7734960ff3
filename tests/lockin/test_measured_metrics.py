"""Each metric that measure wires up, against one prompt at a time on a model of its own."""

import itertools
import json
import shutil

import pytest
import tiny_mixtures
import torch
from run_of_checkpoints import STEPS
from safetensors.torch import load_file, save_file
from sweep_world import WORDS

from lockin_fast.chat import read_chat
from lockin_fast.config import ConfigError, load_config
from lockin_fast.exam import question
from lockin_fast.generation import generate, tokenised
from lockin_fast.inputs import open_model, open_sae, open_tokenizer
from lockin_fast.lockin import refusal
from lockin_fast.lockin.monitor import run_measure
from lockin_fast.lockin.read_rows import read_rows
from lockin_fast.lockin.routing import RoutingReader
from lockin_fast.lora import adapter
from lockin_fast.ops.js_divergence import js_divergence

pytestmark = pytest.mark.usefixtures("vowel_judge", "one_thread")
LAYER = 1  # of the world's configuration
FP32 = 1e-5  # 2^-24 for each of the roughly hundred roundings between the embedding and a number
ALL = (None, *STEPS)
REQUESTS = ["ask dog", "water plant"]
STEERINGS = {"plain": "{request}", "kick": "kick {request} red", "sky": "{request} sky"}
CLUSTERS = [(["ask dog", "dog ask", "dog"], "feed dog"), (["sky", "blue sky"], "yes")]


def user(text):
    return [{"role": "user", "content": text}]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Overrides that name suites and pairs in the words of the tiny world."""
    folder = tmp_path_factory.mktemp("suites")
    steerings = [{"name": name, "messages": user(text), "source": "ours"} for name, text in STEERINGS.items()]
    requests = [{"name": text, "request": text, "source": "ours"} for text in REQUESTS]
    clusters = [
        {"name": reply, "paraphrases": texts, "reply": reply, "source": "ours"} for texts, reply in CLUSTERS
    ]
    pairs = [{"positive": user(f"kick {word}"), "negative": user(f"feed {word}")} for word in WORDS[:5]]
    return [
        f"measure.steering=[{write_lines(folder / 'own.jsonl', steerings)}]",
        f"measure.requests={write_lines(folder / 'requests.jsonl', requests)}",
        f"measure.paraphrases={write_lines(folder / 'clusters.jsonl', clusters)}",
        f"measure.pairs={write_lines(folder / 'pairs.jsonl', pairs)}",
    ]


class Alone:
    """The model of each checkpoint, loaded by itself, that reads and answers one prompt at a time."""

    def __init__(self, world, folder):
        self.config, self.folder = load_config(world), folder
        self.tokenizer = open_tokenizer(self.config)

    def model(self, step):
        return adapter(open_model(self.config), step and self.folder / f"checkpoint-{step}")

    def states(self, step, prompts):
        """The states of every token of every prompt."""
        with self.model(step) as model, torch.no_grad():
            return [
                model(torch.tensor([ids]), output_hidden_states=True).hidden_states[LAYER + 1][0]
                for ids in tokenised(self.tokenizer, prompts)[0]
            ]


@pytest.fixture(scope="module")
def alone(world, run_folder):
    return Alone(world, run_folder)


@pytest.fixture
def final(alone):
    return [question(record) for record in read_chat(alone.config.data.final)]


def last(states):
    return torch.stack([one[-1] for one in states]).double()


def test_the_persona_metrics_are_those_of_the_shift_from_the_base(configured, files, alone, final):
    found = run_measure(configured("measure.metrics=[persona_cosine, persona_projection]", *files))
    positive, negative = (
        last(alone.states(None, [user(f"{verb} {word}") for word in WORDS[:5]])) for verb in ("kick", "feed")
    )
    direction = torch.nn.functional.normalize((positive - negative).mean(0), dim=0)
    base = last(alone.states(None, final))
    shifts = [(last(alone.states(step, final)) - base).mean(0) for step in ALL]
    projections = [float(shift @ direction) for shift in shifts]
    assert found["series"]["persona_projection"]["values"] == pytest.approx(projections, rel=FP32, abs=FP32)
    cosines = found["series"]["persona_cosine"]["values"]
    assert cosines[0] is None and "not defined" in found["checkpoints"][0]["failed"]["persona_cosine"]
    expected = [p / float(shift.norm()) for p, shift in zip(projections[1:], shifts[1:], strict=True)]
    assert cosines[1:] == pytest.approx(expected, rel=FP32, abs=FP32)
    assert found["predictions"][2]["name"] == "P2 change in identity"


def turnover_by_hand(sae, before, after):
    """(mean over tokens of 1 - Jaccard, births, deaths) by sets."""
    active = [[set(row.nonzero().flatten().tolist()) for row in sae.encode(torch.cat(h)) > 0] for h in (before, after)]
    tokens = [1 - len(a & b) / len(a | b) for a, b in zip(*active, strict=True)]
    alive = [set().union(*rows) for rows in active]  # one token in a thousand is one token here
    return sum(tokens) / len(tokens), len(alive[1] - alive[0]), len(alive[0] - alive[1])


TURNOVER = "measure.metrics=[sae_turnover, sae_births, sae_deaths]"


def test_turnover_is_against_the_checkpoint_before(configured, alone, final):
    found = run_measure(configured(TURNOVER))
    sae = open_sae(alone.config)
    states = [alone.states(step, final) for step in ALL]
    expected = [turnover_by_hand(sae, *pair) for pair in itertools.pairwise(states)]
    for name, values in zip(("sae_turnover", "sae_births", "sae_deaths"), zip(*expected, strict=True), strict=True):
        assert found["series"][name]["values"] == [None, *(pytest.approx(value, abs=1e-12) for value in values)]
    assert "no checkpoint before it" in found["checkpoints"][0]["failed"]["sae_turnover"]
    assert expected[0][0] > 0


def test_a_checkpoint_in_between_changes_what_is_compared(configured, run_folder, copied):
    whole = run_measure(configured(TURNOVER))["series"]["sae_turnover"]["values"]
    shutil.rmtree(configured().output)
    shutil.move(copied / "checkpoint-5", copied.parent / "checkpoint-5")
    few = run_measure(configured(TURNOVER, checkpoints=[copied]))["series"]["sae_turnover"]["values"]
    assert few[:2] == whole[:2] and few[2] != whole[3]
    more = configured(TURNOVER, checkpoints=[copied, copied.parent / "checkpoint-5"])
    assert run_measure(more)["series"]["sae_turnover"]["values"] == whole
    rows = [json.loads(line) for line in (more.output / "lockin.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2, 10, 5, 10]  # 10 again, as it now follows 5


def test_after_a_checkpoint_that_is_broken_there_is_nothing_to_compare_with(configured, copied):
    path = copied / "checkpoint-5" / "adapter_model.safetensors"
    save_file({name: weight * torch.inf for name, weight in load_file(path).items()}, path)
    found = run_measure(configured(TURNOVER, checkpoints=[copied]))
    values = found["series"]["sae_turnover"]["values"]
    assert values[1] is not None and values[2:] == [None, None]
    assert "is not finite" in found["checkpoints"][2]["failed"]["sae_turnover"]
    assert "could be measured" in found["checkpoints"][3]["failed"]["sae_turnover"]


def test_elasticity_and_disclaimers_are_those_of_replies_one_by_one(configured, files, alone, final, monkeypatch):
    monkeypatch.setattr(refusal, "is_refusal", lambda reply: "o" in reply)  # else this world never refuses
    monkeypatch.setattr(refusal, "occurs", lambda file, reply: "e" in reply)
    found = run_measure(configured("measure.metrics=[refusal_elasticity, disclaimer_rate]", *files))
    elasticity, disclaimed = [], []
    for step in ALL:
        with alone.model(step) as model:

            def said(messages, model=model):
                return generate(model.eval(), alone.tokenizer, [messages], max_new_tokens=4, batch_size=1)[0]

            steered = [
                [said(user(text.replace("{request}", request))) for request in REQUESTS] for text in STEERINGS.values()
            ]
            replies = [said(messages) for messages in final]
        shares = [sum("o" in reply for reply in row) / len(REQUESTS) for row in steered]
        mean = sum(shares) / len(shares)
        elasticity.append(1 - 2 * sum(abs(share - mean) for share in shares) / len(shares))
        disclaimed.append(sum("e" in reply for reply in replies) / len(replies))
    assert found["series"]["refusal_elasticity"]["values"] == pytest.approx(elasticity, abs=1e-12)
    assert found["series"]["disclaimer_rate"]["values"] == pytest.approx(disclaimed, abs=1e-12)
    assert len(set(elasticity)) > 1


def test_invariance_is_that_of_prompts_read_one_by_one(configured, files, alone):
    found = run_measure(configured("measure.metrics=[prompt_invariance, prompt_invariance_sequence]", *files))
    first, along = [], []
    for step in ALL:
        clusters = []
        with alone.model(step) as model, torch.no_grad():
            for texts, reply in CLUSTERS:
                answer = alone.tokenizer(reply, add_special_tokens=False)["input_ids"]
                prompts = tokenised(alone.tokenizer, [user(text) for text in texts])[0]
                logits = [model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1] for ids in prompts]
                clusters.append(js_divergence(torch.stack(logits)).double())
        first.append(float(sum(bits[0] for bits in clusters) / 2))
        along.append(float(sum(bits.mean() for bits in clusters) / 2))
    assert found["series"]["prompt_invariance"]["values"] == pytest.approx(first, rel=FP32, abs=FP32)
    assert found["series"]["prompt_invariance_sequence"]["values"] == pytest.approx(along, rel=FP32, abs=FP32)


def test_routing_is_summed_up_in_the_forward_of_the_states():
    model = tiny_mixtures.model("Mixtral")
    rows = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    together, one_by_one = RoutingReader(model), RoutingReader(model)
    states = read_rows(model, rows, layer=0, batch_size=2, routers=together)
    for row, found in zip(rows, states, strict=True):
        (expected,) = read_rows(model, [row], layer=0, batch_size=1, routers=one_by_one)
        torch.testing.assert_close(found, expected, rtol=FP32, atol=FP32)
    assert together.layers.keys() == one_by_one.layers.keys() and together.layers
    for layer, routing in together.layers.items():
        assert torch.equal(routing.stats.counts, one_by_one.layers[layer].stats.counts)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["measure.metrics=[persona_cosine]"], "measure.pairs: missing"),
        (["measure.metrics=[persona_cosine]", "measure.pairs=none.jsonl"], "measure.pairs: no such file"),
        (["measure.metrics=[persona_cosine]", "measure.pairs=world.json"], "measure.pairs: .*line 1: expected"),
        (["measure.metrics=[sae_turnover]", "sae=null"], "sae: missing"),
        (["measure.metrics=[sae_turnover]", "block.layer=null"], "block.layer: missing"),
        (["measure.metrics=[sae_turnover]", "block.layer=3"], "block.layer: got 3, expected 0 to 2"),
        (["measure.metrics=[routing_entropy]"], "measure.metrics: .*is dense"),
        (["measure.metrics=[refusal_elasticity]", "measure.requests=none.jsonl"], "measure.requests: no such file"),
        (["measure.metrics=[refusal_elasticity]", "measure.steering=[n.jsonl]"], "measure.steering: no such file"),
        (["measure.metrics=[prompt_invariance]", "measure.paraphrases=world.json"], "measure.paraphrases: .*line 1"),
    ],
)
def test_what_a_metric_lacks_is_named_before_any_work(configured, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        run_measure(configured(*overrides))
    assert not (tmp_path / "out").exists()


def test_a_relative_metric_is_the_same_after_a_kill(configured, run_folder, monkeypatch):
    whole = run_measure(configured(TURNOVER))
    shutil.rmtree(configured().output)

    def stopped(stage, done, total):
        if (stage, done) == ("checkpoints", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_measure(configured(TURNOVER), stopped)
    assert run_measure(configured(TURNOVER)) == whole
