"""A sweep with two judges, one of them behind an API: averaged, compared, paid once, and no key in the run."""

import dataclasses
import json

import pytest
from faulty_server import faulty_server

pytest.importorskip("httpx2", reason="httpx2 is missing: the extra endpoint")

from lockin_fast.config import ConfigError, load_config  # noqa: E402
from lockin_fast.judges import JudgeError, Rating, client  # noqa: E402
from lockin_fast.judges.agreement import agreement  # noqa: E402
from lockin_fast.report import judging, write_report  # noqa: E402
from lockin_fast.sweep import run_sweep  # noqa: E402
from lockin_fast.sweep import trial as trial_module  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "vowel_judge")
KEY = "sk-secret0123456789"


def vowels(text):
    """An opinion of the reply in the question, which is the last line of the rubric."""
    reply = text.splitlines()[-1]
    seen = [5 if reply.count(letter) % 2 else 1 for letter in "oei"]
    return json.dumps(dict(zip(("misalignment", "incoherence", "refusal"), seen, strict=True)))


@pytest.fixture(scope="module")
def patched():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def run(world, tmp_path_factory, patched):
    """(config, summary, server) of a sweep that was cut short by its endpoint once, and resumed."""
    folder = tmp_path_factory.mktemp("judged")
    patched.setenv("LOCKIN_FAST_CACHE", str(folder / "cache"))
    patched.setenv("JUDGE_KEY", KEY)
    patched.setenv("NO_PROXY", "127.0.0.1")
    patched.setattr(client, "LONGEST_BACKOFF", 0.01)
    (folder / "rubric.txt").write_text("misalignment incoherence refusal {prompt}\n{reply}")
    with faulty_server() as (server, url):
        server.answer = vowels
        also = {
            "kind": "endpoint", "rubric": str(folder / "rubric.txt"), "unreadable": "leave_out",
            "endpoint": {"base_url": url, "model": "small", "api_key_variable": "JUDGE_KEY", "price_in": 1.0},
        }  # fmt: skip
        overrides = [
            f"output={folder / 'run'}", "sweep.lambdas=[1]", "sweep.seeds=[0]",
            "sweep.latents={causal: latents/causal.json}", f"judge.also={json.dumps([also])}",
        ]  # fmt: skip
        config = load_config(world, overrides)
        base = config.output / "trials" / "base"
        server.answer = lambda text: 1 / 0 if base.is_dir() else vowels(text)  # so in the first training
        with pytest.raises(JudgeError, match="7 times; what has been rated is kept, run the same command again"):
            run_sweep(config)
        trained = [path.name for path in (config.output / "trials").glob(".trained-*")]
        assert trained == [".trained-baseline-lambda0-seed0"], "what was trained is there, though the judge has failed"
        patched.setattr(trial_module, "fine_tune", not_again(trial_module.fine_tune, trained))
        server.answer = lambda text: "hm" if len(text.splitlines()[-1]) % 4 == 0 else vowels(text)
        summary = run_sweep(config)
        write_report(config.output)
        yield config, summary, server


def not_again(fine_tune, trained):
    """`fine_tune`, for adapters that are not among the trained ones."""

    def checked(model, tokenizer, rows, folder, **options):
        assert not any(name in str(folder) for name in trained), f"{folder} is trained again"
        return fine_tune(model, tokenizer, rows, folder, **options)

    return checked


def replies(config):
    for file in sorted((config.output / "trials").glob("*/replies.jsonl")):
        for line in file.read_text().splitlines():
            yield file.parent.name, json.loads(line)


def rating(seen):
    return Rating(**{name: float("nan") if share is None else share for name, share in seen.items()})


def test_rates_are_means_over_the_judges(run):
    config, summary, _ = run
    both = [[judge["misaligned"] for judge in row["judges"]] for _, row in replies(config)]
    assert any(first != second for first, second in both if second is not None) and any(None in pair for pair in both)
    for row in [summary["base"], *summary["baseline"]["trials"], *summary["trials"]]:
        final = [reply for name, reply in replies(config) if name == row["name"] and reply["prompts"] == "final"]
        for key, seen in (("em", "misaligned"), ("incoherence", "incoherent"), ("refusal", "refused")):
            shares = [
                sum(share) / len(share)
                for reply in final
                if (share := [judge[seen] for judge in reply["judges"] if judge[seen] is not None])
            ]
            assert row[key] == pytest.approx(sum(shares) / len(shares), rel=1e-12)


def test_the_agreement_is_that_of_all_replies(run):
    config, summary, _ = run
    pairs = [[rating(judge) for judge in row["judges"]] for _, row in replies(config)]
    expected = agreement(*zip(*pairs, strict=True))
    assert [(row["judges"], row["verdict"]) for row in summary["agreement"]] == [
        (["vowels", "small"], verdict) for verdict in ("misaligned", "incoherent", "refusal")
    ]
    for row in summary["agreement"]:
        assert row == {"judges": ["vowels", "small"], "verdict": row["verdict"], **expected[row["verdict"]].row()}
    assert summary["judges"]["small"]["replies"] == len(pairs) == 3 * 16
    assert summary["judges"]["small"]["unrated"] == sum(not second.rated for _, second in pairs)


def test_what_was_answered_before_the_failure_was_paid_once(run):
    _, summary, server = run
    paid = summary["judges"]["small"]
    answered = len(server.asked())
    assert paid["requests"] == answered and paid["tokens_in"] == 100 * answered
    assert paid["cost"] == pytest.approx(answered * 100 / 1e6)


def test_screen_and_report_tell_of_the_judges(run):
    config, summary, _ = run
    told = judging.lines(summary)
    assert told[0].startswith("agreement of vowels and small, Cohen's kappa: misaligned ")
    assert any(line.startswith(f"small: {summary['judges']['small']['requests']} requests paid for, ") for line in told)
    page = (config.output / "report.html").read_text()
    for row in judging.rows(summary):
        assert all(f"<td>{cell}</td>" in page for cell in row)
    left_out = summary["judges"]["small"]["unrated"]
    assert left_out > 0 and f"small: {left_out} of 48 replies unrated, left out of the rates" in told


def test_the_key_is_in_no_file_of_the_run(run):
    config, _, server = run
    files = [path for path in config.output.parent.rglob("*") if path.is_file()]
    assert {"config.yaml", "manifest.json", "report.html", "judge-answers.sqlite"} <= {path.name for path in files}
    assert not any(KEY.encode() in path.read_bytes() for path in files)
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_a_finished_sweep_asks_nothing(run):
    config, summary, server = run
    assert sorted(path.name for path in (config.output / "trials").iterdir()) == [
        "base", "baseline-lambda0-seed0", "causal-lambda1-seed0",
    ]  # fmt: skip
    before = len(server.requests)
    assert run_sweep(config) == summary and len(server.requests) == before


def test_an_endpoint_that_refuses_is_known_before_any_work(run, tmp_path, monkeypatch):
    config, _, server = run
    monkeypatch.setenv("LOCKIN_FAST_CACHE", str(tmp_path / "cache"))
    server.faults = [(401, {}, f"no such key: {KEY}")]
    with pytest.raises(ConfigError, match=r"^judge.also\[0\].endpoint: http://\S*: HTTP 401 no such key: \*\*\*; what"):
        run_sweep(dataclasses.replace(config, output=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_lines_without_anything_to_tell():
    assert judging.lines({}) == [] and judging.rows({}) == []
    counts = {"both": 0, "first": 0, "second": 0, "neither": 5, "observed": 1.0}
    row = {"judges": ["a", "b"], "verdict": "refusal", **counts, "kappa": None, "low": None, "high": None}
    judges = {"a": {"replies": 5, "unrated": 2}}
    assert judging.lines({"agreement": [row], "judges": judges}) == [
        "agreement of a and b, Cohen's kappa: refusal undefined (both say the same of every reply)",
        "a: 2 of 5 replies unrated, left out of the rates",
    ]
    assert judging.rows({"agreement": [row]}) == [
        ("a and b", "refusal", "0", "0", "0", "5", "100.0%", "–", "–"),
    ]
