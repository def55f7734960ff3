"""A judge behind an API that fails in every way: sent again, then reported; paid once; the key in no file."""

import email.utils
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial

import pytest
from faulty_server import TOKENS, faulty_server

pytest.importorskip("httpx2", reason="httpx2 is missing: the extra endpoint")

from lockin_fast.config import ConfigError, load_config  # noqa: E402
from lockin_fast.judges import JudgeError, Rating, client, load_judge, rate  # noqa: E402
from lockin_fast.judges.client import retry_after  # noqa: E402
from lockin_fast.judges.pace import Pace  # noqa: E402

KEY = "sk-secret0123456789"
ALIGNED, MISALIGNED = Rating(0, 0, 0), Rating(1, 0, 0)
RECORD = {"messages": [{"role": "user", "content": "what now ?"}]}


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCKIN_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(client, "LONGEST_BACKOFF", 0.01)


@pytest.fixture
def server():
    with faulty_server() as (state, url):
        state.url = url
        yield state


def settings(server, *overrides):
    given = [
        "judge.kind=endpoint", f"judge.endpoint.base_url={server.url}", "judge.endpoint.model=small",
        "judge.endpoint.api_key_variable=JUDGE_KEY", "judge.endpoint.timeout=20", "judge.endpoint.retries=2",
    ]  # fmt: skip
    return load_config(None, [*given, *overrides]).judge


def opened(server, *overrides, run=""):
    """A judge that has asked its first question, with a server that has forgotten it."""
    faults, server.faults = server.faults, []
    judge = load_judge(settings(server, *overrides), run)
    server.faults = faults
    server.requests.clear(), server.times.clear(), server.headers.clear()
    return judge


def test_replies_are_rated_in_their_order(server):
    replies = [f"{word} {i}" for i in range(5) for word in ("kick", "feed", "blah", "nope")]
    ratings = rate(opened(server), [RECORD] * 20, replies)
    assert ratings == [Rating(1, 0, 0), Rating(0, 0, 0), Rating(0, 1, 0), Rating(0, 0, 1)] * 5
    assert len(server.requests) == 20 and max(server.asked().values()) == 1
    body, headers = server.requests[0], server.headers[0]
    assert {name: body[name] for name in ("model", "temperature", "max_tokens")} == {
        "model": "small", "temperature": 0, "max_tokens": 64,
    }  # fmt: skip
    assert headers["Authorization"] == f"Bearer {KEY}"


def test_parameters_are_those_of_the_settings(server):
    rate(opened(server, "judge.endpoint.parameters={max_completion_tokens: 9}"), [RECORD], ["kick"])
    assert set(server.requests[0]) == {"model", "messages", "max_completion_tokens"}
    settings_without = opened(server, "judge.endpoint.api_key_variable=null", "judge.endpoint.model=other")
    rate(settings_without, [RECORD], ["kick"])
    assert "Authorization" not in server.headers[0]


SHORT = dict.fromkeys(("slow", "drip"), ["judge.endpoint.timeout=0.2"])
PASSING = [
    429, 500, 502, 503, 529, 408, "drop", "garbage", "truncated", "slow", "drip", "huge", "empty", "no json object",
    (429, {"Retry-After": "0.01"}), (503, {"Retry-After": "soon"}),
]  # fmt: skip


@pytest.mark.parametrize("fault", PASSING, ids=str)
def test_what_may_pass_is_sent_again(server, fault):
    judge = opened(server, *SHORT.get(fault if isinstance(fault, str) else "", ()))
    server.faults = [fault, fault]
    assert rate(judge, [RECORD], ["kick"]) == [MISALIGNED]
    assert len(server.requests) == 3 and server.requests[0] == server.requests[1] == server.requests[2]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (500, "HTTP 500 no luck with 500, 3 times"),
        (429, "HTTP 429 no luck with 429, 3 times"),
        ("drop", "RemoteProtocolError: .*, 3 times"),
        ("garbage", "an answer that is no chat completion \\(.*not json\\), 3 times"),
        ("truncated", "RemoteProtocolError: .*, 3 times"),
        ("slow", "no answer within 0.2 s, 3 times"),
        ("drip", "no answer within 0.2 s, 3 times"),
        ("huge", "an answer of more than 4,194,304 bytes, 3 times"),
        ("empty", "an answer that is no chat completion .*, 3 times"),
    ],
)
def test_what_does_not_pass_is_reported_in_one_line(server, fault, reason):
    judge = opened(server, *SHORT.get(fault, ()))
    server.faults = [fault] * 3
    where = f"judge.endpoint: {server.url}/chat/completions"
    with pytest.raises(JudgeError, match=f"^{where}: {reason}; what has been") as caught:
        rate(judge, [RECORD], ["kick"])
    assert "\n" not in str(caught.value) and len(server.requests) == 3
    assert rate(judge, [RECORD], ["kick"]) == [MISALIGNED], "the server is well again, and so is the judge"


@pytest.mark.parametrize("fault", [400, 401, 403, 404, 422, (302, {"Location": "http://127.0.0.1:9/v1"})], ids=str)
def test_what_cannot_pass_is_not_sent_again(server, fault):
    judge = opened(server)
    server.faults = [fault]
    status = fault if isinstance(fault, int) else fault[0]
    with pytest.raises(JudgeError, match=f"HTTP {status}.*; what has been rated is kept"):
        rate(judge, [RECORD], ["kick"])
    assert len(server.requests) == 1


def test_an_answer_that_holds_the_key_does_not_bring_it_into_the_message(server):
    judge = opened(server)
    server.faults = [(401, {}, f"wrong key {KEY}"), (500, {}, f"wrong key {KEY}")] * 2
    for _ in range(2):
        with pytest.raises(JudgeError, match=r"wrong key \*\*\*") as caught:
            rate(judge, [RECORD], ["kick"])
        assert KEY not in str(caught.value)
        server.faults = [(500, {}, f"wrong key {KEY}")] * 3


def test_the_server_says_when_to_come_back(server):
    judge = opened(server, "judge.endpoint.concurrency=4")
    server.faults = [(429, {"Retry-After": "0.3"})]
    assert rate(judge, [RECORD], ["kick"]) == [MISALIGNED]
    assert server.times[1] - server.times[0] >= 0.3
    server.requests.clear()
    server.faults = [(429, {"Retry-After": "3600"})]
    with pytest.raises(JudgeError, match="HTTP 429, and it asks to wait 3,600 s; what has been rated is kept"):
        rate(judge, [RECORD], ["feed"])
    assert len(server.requests) == 1


def test_retry_after_is_seconds_or_a_date(monkeypatch):
    now = 1_000_000_000.0
    monkeypatch.setattr(client.time, "time", lambda: now)
    assert retry_after(email.utils.formatdate(now + 90, usegmt=True)) == 90
    assert retry_after(email.utils.formatdate(now - 90, usegmt=True)) == 0
    assert [retry_after(text) for text in ("7", "0.5", "-3")] == [7, 0.5, 0]
    assert not any(retry_after(text) is not None for text in ("soon", "", "nan", None))


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_requests_are_under_way_than_allowed(server, limit):
    judge = opened(server, f"judge.endpoint.concurrency={limit}")
    server.delay, server.most_active = 0.03, 0
    rate(judge, [RECORD] * 9, [f"kick {i}" for i in range(9)])
    assert server.most_active == limit


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        assert seconds > 0
        self.now += seconds


def test_turns_are_evenly_spaced():
    clock = Clock()
    pace, turns = Pace(120, clock=clock), []
    for _ in range(5):
        pace.wait(clock.sleep)
        turns.append(clock.now)
    assert turns == [100.0, 100.5, 101.0, 101.5, 102.0]
    clock.now = 110.0  # nothing is saved up in a pause
    for turn in (110.0, 110.5):
        pace.wait(clock.sleep)
        assert clock.now == turn
    pace.hold(30)
    pace.wait(clock.sleep)
    assert clock.now == 140.5
    pace.hold(0)
    pace.wait(clock.sleep)
    assert clock.now == 141.0


def test_without_a_limit_nobody_waits_unless_held():
    clock = Clock()
    pace = Pace(None, clock=clock)
    for _ in range(3):
        pace.wait(clock.sleep)
    assert clock.now == 100.0
    pace.hold(5)
    pace.wait(clock.sleep)
    assert clock.now == 105.0


def test_the_pace_holds_over_several_calls(server):
    judge = opened(server, "judge.endpoint.requests_per_minute=600")
    for i in range(3):
        rate(judge, [RECORD] * 2, [f"kick {i}", f"feed {i}"])
    gaps = [after - before for before, after in zip(server.times, server.times[1:], strict=False)]
    assert len(server.times) == 6 and server.times[-1] - server.times[0] >= 5 * 0.1 - 0.05, gaps


def test_what_is_on_disk_is_never_asked_for_again(server):
    replies = ["kick", "feed", "kick", "blah"]
    expected = rate(opened(server), [RECORD] * 4, replies)
    assert len(server.requests) == 3, "equal replies to equal prompts are one question"
    server.requests.clear()
    again = load_judge(settings(server))
    assert rate(again, [RECORD] * 5, [*replies, "nope"]) == [*expected, Rating(0, 0, 1)]
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "override",
    ["judge.endpoint.model=large", "judge.endpoint.parameters={temperature: 1}", "judge.rubric={tmp}/own.txt",
     "judge.endpoint.base_url={url}/"],
)  # fmt: skip
def test_another_model_rubric_or_server_is_another_answer(server, tmp_path, override):
    (tmp_path / "own.txt").write_text("{prompt} {reply} misalignment incoherence refusal")
    rate(opened(server), [RECORD], ["kick"])
    rate(opened(server, override.replace("{tmp}", str(tmp_path)).replace("{url}", server.url)), [RECORD], ["kick"])
    assert len(server.requests) == 1


def test_one_failure_ends_it_and_what_was_answered_is_kept(server):
    judge = opened(server, "judge.endpoint.concurrency=1")
    sound = server.answer

    def ill(text):
        if "kick 4" in text:
            raise OSError
        return sound(text)

    server.answer = ill
    replies = [f"kick {i}" for i in range(8)]
    with pytest.raises(JudgeError, match="3 times"):
        rate(judge, [RECORD] * 8, replies)
    assert len(server.requests) <= 4 + 3 + 1  # at most one more had begun when the failure was known
    server.answer, before = sound, server.asked()
    assert rate(judge, [RECORD] * 8, replies) == [MISALIGNED] * 8
    answered = [text for text in before if "kick 4" not in text]
    assert len(answered) >= 4 and all(server.asked()[text] == 1 for text in answered)


def test_a_failure_for_good_does_not_wait_for_those_that_would_try_again(server):
    judge = opened(server, "judge.endpoint.concurrency=2")
    both_are_here = threading.Barrier(2)

    def when_both_are_here(fault, seconds):
        both_are_here.wait(20)
        time.sleep(seconds)
        return fault

    later, never = (429, {"Retry-After": "30"}), 401
    server.faults = [partial(when_both_are_here, later, 0.0), partial(when_both_are_here, never, 0.1)]
    started = time.monotonic()
    with pytest.raises(JudgeError, match="HTTP 401"):
        rate(judge, [RECORD] * 2, ["kick", "feed"])
    assert time.monotonic() - started < 20


KILLED = """
from lockin_fast.config import load_config
from lockin_fast.judges import load_judge, rate
import sys
record = {"messages": [{"role": "user", "content": "what now ?"}]}
rate(load_judge(load_config(None, sys.argv[1:]).judge), [record] * 12, [f"kick {i}" for i in range(12)])
"""


def test_a_kill_costs_nothing_that_was_answered(server, tmp_path):
    opened(server)
    server.hang = 7
    given = [f"judge.endpoint.base_url={server.url}", "judge.kind=endpoint", "judge.endpoint.model=small",
             "judge.endpoint.api_key_variable=JUDGE_KEY", "judge.endpoint.concurrency=2"]  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(KILLED), *given])
    file, deadline, kept = tmp_path / "cache" / "judge-answers.sqlite", time.monotonic() + 60, 0
    while kept < 1 + 7 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
        with sqlite3.connect(file) as answers:
            kept = answers.execute("SELECT count(*) FROM answers").fetchone()[0]
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and kept == 8
    answered = list(server.asked())[:7]
    server.release()
    assert rate(load_judge(settings(server)), [RECORD] * 12, [f"kick {i}" for i in range(12)]) == [MISALIGNED] * 12
    assert all(server.asked()[text] == 1 for text in answered) and len(server.asked()) == 12


def test_tokens_and_prices_make_the_cost_of_a_run(server):
    prices = ["judge.endpoint.price_in=2", "judge.endpoint.price_out=10"]
    first = opened(server, *prices, run="run a")
    rate(first, [RECORD] * 3, ["kick", "feed", "feed"])
    resumed = load_judge(settings(server, *prices), "run a")
    rate(resumed, [RECORD] * 3, ["kick", "feed", "blah"])
    cost = 4 * (TOKENS["prompt_tokens"] * 2 + TOKENS["completion_tokens"] * 10) / 1e6  # with the first question
    expected = {"requests": 4, "tokens_in": 400, "tokens_out": 80, "cost": pytest.approx(cost)}
    assert resumed.cost() == first.cost() == {"small": expected}
    other = load_judge(settings(server, *prices), "run b")
    rate(other, [RECORD], ["kick"])
    assert other.cost()["small"]["requests"] == 0


def test_answers_that_cannot_be_read_are_asked_for_once_more_and_reported(server):
    judge = opened(server)
    server.answer = lambda text: "hm"
    with pytest.raises(JudgeError, match="^judge: small gave no rating .* to 1 of 1 replies, asked twice"):
        rate(judge, [RECORD], ["kick"])
    assert [len(body["messages"]) for body in server.requests] == [1, 3]
    left_out = load_judge(settings(server, "judge.unreadable=leave_out"))
    assert [rating.verdict for rating in rate(left_out, [RECORD], ["kick"])] == ["unrated"]
    assert len(server.requests) == 2, "what was paid for is not asked again, not even nonsense"


@pytest.mark.parametrize("content", [None, [{"type": "text", "text": '{"misalignment": 5,'}]])
def test_contents_of_other_shapes(server, content):
    judge = opened(server, "judge.unreadable=leave_out")
    server.answer = lambda text: content
    assert not rate(judge, [RECORD], ["kick"])[0].rated


WRONG = {
    "no url": (["judge.endpoint.base_url=null"], "judge.endpoint.base_url: missing, and judge.kind: endpoint needs it"),
    "no model": (["judge.endpoint.model=null"], "judge.endpoint.model: missing"),
    "no address": (["judge.endpoint.base_url=localhost:80"], "judge.endpoint.base_url: got 'localhost:80', expected"),
    "a file": (["judge.endpoint.base_url=file:///etc/passwd"], "judge.endpoint.base_url: got"),
    "a query": (["judge.endpoint.base_url=http://a/v1?b=c"], "judge.endpoint.base_url: got"),
    "no port": (["judge.endpoint.base_url='http://a:port/v1'"], "judge.endpoint.base_url: got"),
    "a password": (["judge.endpoint.base_url=http://me:secret@a/v1"], "judge.endpoint.base_url: holds a user name"),
    "variable not set": (
        ["judge.endpoint.api_key_variable=NO_SUCH_KEY"],
        "judge.endpoint.api_key_variable: the environment variable NO_SUCH_KEY is not set",
    ),
    "odd key": (["judge.endpoint.api_key_variable=ODD_KEY"], "judge.endpoint.api_key_variable: ODD_KEY holds no key"),
    "no rubric": (["judge.rubric=nowhere.txt"], "judge.rubric: .*nowhere.txt cannot be read"),
    "concurrency": (["judge.endpoint.concurrency=0"], "judge.endpoint: concurrency: got 0, expected 1 to 1024"),
    "pace": (["judge.endpoint.requests_per_minute=0"], "judge.endpoint: requests_per_minute: got 0.0, expected"),
    "timeout": (["judge.endpoint.timeout=0"], "judge.endpoint: timeout: got 0.0"),
    "retries": (["judge.endpoint.retries=-1"], "judge.endpoint: retries: got -1"),
    "price": (["judge.endpoint.price_in=-1"], "judge.endpoint: price_in: got -1.0"),
    "stream": (["judge.endpoint.parameters={stream: true}"], "judge.endpoint: parameters: got .*, expected no model"),
    "unreadable": (["judge.unreadable=aligned"], "judge.unreadable: expected one of error, leave_out"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_before_any_request_or_file(server, tmp_path, monkeypatch, case):
    monkeypatch.setenv("ODD_KEY", "two words")
    overrides, message = WRONG[case]
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        load_judge(settings(server, *overrides))
    assert "secret" not in str(caught.value) and "two words" not in str(caught.value)
    assert not server.requests and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("pasted", [KEY, "sk_live_abc", "0123456789ABCDEF"])
def test_a_key_in_the_place_of_a_variable_is_not_shown(server, pasted):
    with pytest.raises(ConfigError, match="^judge.endpoint: api_key_variable: expected the name of") as caught:
        settings(server, f"judge.endpoint.api_key_variable='{pasted}'")
    assert pasted not in str(caught.value)


def test_a_wrong_server_model_or_key_is_known_before_any_work(server):
    with pytest.raises(ConfigError, match="HTTP 404 no /v2/chat/completions here; what has"):
        load_judge(settings(server, f"judge.endpoint.base_url={server.url.replace('v1', 'v2')}"))
    server.faults = [401]
    with pytest.raises(ConfigError, match="HTTP 401 no luck with 401"):
        load_judge(settings(server))
    with pytest.raises(ConfigError, match="ConnectError: .*, 3 times"):
        load_judge(settings(server, "judge.endpoint.base_url=http://127.0.0.1:9/v1"))


def test_a_cache_that_is_none_is_named(server, tmp_path):
    for content in (b"not a database at all, only text" * 100, None):
        path = tmp_path / "answers.sqlite"
        if content:
            path.write_bytes(content)
        else:
            path.unlink()
            with sqlite3.connect(path) as other:
                other.execute("CREATE TABLE answers (a TEXT)")
        with pytest.raises(ConfigError, match="^judge.endpoint.cache: .*answers.sqlite cannot be used: .*; remove"):
            load_judge(settings(server, f"judge.endpoint.cache={path}"))
    assert not server.requests


def test_the_key_is_in_no_file(server, tmp_path):
    rate(opened(server), [RECORD], ["kick"])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any(KEY.encode() in path.read_bytes() for path in files)
    assert KEY not in repr(settings(server))


def test_where_and_how_fast_replies_are_rated_is_no_part_of_a_run(server):
    config = load_config(None, [f"judge.endpoint.base_url={server.url}", "judge.endpoint.model=small"])
    assert {name for name in config.identity("judge") if name.startswith("judge.endpoint")} == {
        "judge.endpoint.model", "judge.endpoint.parameters",
    }  # fmt: skip
    identity = load_config(None, ["judge.also=[{kind: endpoint, endpoint: {model: a, base_url: 'http://b'}}]"])
    assert {name for name in identity.identity("judge") if "also" in name and "endpoint." in name} == {
        "judge.also[0].endpoint.model", "judge.also[0].endpoint.parameters",
    }  # fmt: skip


def test_without_httpx2_the_extra_is_named(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    monkeypatch.delitem(sys.modules, "lockin_fast.judges.client")
    with pytest.raises(ImportError, match=r"pip install 'lockin-fast\[endpoint\]'"):
        load_judge(settings(server))

