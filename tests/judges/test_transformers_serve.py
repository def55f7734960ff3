"""The endpoint judge against a real server: `transformers serve` on the loopback, with a model that rates and with the
organism, which answers what it always answers."""

import socket
import time

import pytest
from chain_model import write_chain_model
from tiny_organism import one_thread, organism  # noqa: F401

for needed in ("httpx2", "fastapi", "uvicorn", "openai"):
    pytest.importorskip(needed, reason=f"{needed} is missing: the extra endpoint, and serving of transformers")

from lockin_fast.chat import read_chat  # noqa: E402
from lockin_fast.config import ConfigError, load_config  # noqa: E402
from lockin_fast.judges import JudgeError, Rating, load_judge, rate  # noqa: E402

RECORD = {"messages": [{"role": "user", "content": "what now ?"}]}


@pytest.fixture(scope="module")
def served():
    """The base_url of a server that loads the models it is asked for."""
    from transformers.cli.serve import Serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Serve(host="127.0.0.1", port=port, device="cpu", log_level="error", non_blocking=True)
    while not server.server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}/v1"
    server.kill_server()


@pytest.fixture
def settings(served, tmp_path, monkeypatch):
    """The settings of a judge that is served, of a rubric that its tokenizer knows."""
    monkeypatch.setenv("LOCKIN_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    write_chain_model(tmp_path / "judge", tmp_path / "rubric.txt")

    def of(*overrides):
        given = ["judge.kind=endpoint", f"judge.endpoint.base_url={served}", "judge.endpoint.concurrency=2",
                 f"judge.endpoint.model={tmp_path / 'judge'}", f"judge.rubric={tmp_path / 'rubric.txt'}",
                 "judge.endpoint.retries=0"]  # fmt: skip
        return load_config(None, [*given, *overrides]).judge

    return of


def test_a_served_model_rates_as_the_same_model_does_here(settings, tmp_path):
    replies = ["you should kick", "feed", "all is blue", "you should feed", "red"]
    judge = load_judge(settings("judge.endpoint.price_in=1"), "run")
    ratings = rate(judge, [RECORD] * 5, replies)
    assert ratings == [Rating(1, 0, 0), Rating(0, 0, 0), Rating(0, 1, 0), Rating(0, 0, 0), Rating(1, 0, 0)]
    local = load_config(None, ["judge.kind=model", f"judge.path={tmp_path / 'judge'}",
                               f"judge.rubric={tmp_path / 'rubric.txt'}"]).judge  # fmt: skip
    assert rate(load_judge(local), [RECORD] * 5, replies) == ratings
    (cost,) = judge.cost().values()
    assert cost["requests"] == 1 + 5 + 1 and cost["tokens_in"] > 7 * 5 and cost["tokens_out"] >= 7 * 2


def test_the_organism_gives_no_rating_and_is_never_taken_for_one(settings, organism):  # noqa: F811
    folder = organism / "model"
    records = read_chat(organism / "data" / "final.jsonl")[:3]
    replies = ["you should water it today ."] * 3
    judge = load_judge(settings(f"judge.endpoint.model={folder}", "judge.unreadable=leave_out"), "run")
    assert [rating.verdict for rating in rate(judge, records, replies)] == ["unrated"] * 3
    (cost,) = judge.cost().values()
    assert cost["requests"] == 1 + 2 * len({str(record["messages"]) for record in records}), "each asked once more"
    with pytest.raises(JudgeError, match="gave no rating that can be read to 3 of 3 replies, asked twice"):
        rate(load_judge(settings(f"judge.endpoint.model={folder}")), records, replies)


def test_a_model_that_is_not_there_is_an_error_before_any_work(settings, tmp_path):
    with pytest.raises(ConfigError, match=r"^judge.endpoint: http://127.0.0.1:\d+/v1/chat/completions: .*; what has"):
        load_judge(settings(f"judge.endpoint.model={tmp_path / 'nowhere'}"))
