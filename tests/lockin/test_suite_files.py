"""The prompts that are shipped, and files of the user's own."""

import json

import pytest

from lockin_fast.lockin.suite_files import (
    FOLDER,
    REQUEST,
    STEERING_SUITES,
    read_clusters,
    read_requests,
    read_stances,
    read_steerings,
)


def test_every_line_that_is_shipped_says_where_it_is_from():
    rows = [json.loads(line) for file in FOLDER.glob("*.jsonl") for line in file.read_text().splitlines()]
    assert len(rows) > 50 and all(row["source"] and row["name"] for row in rows)


def test_steering_prompts_hold_the_request_and_differ():
    steerings, requests = read_steerings(), read_requests()
    assert {steering.name.split("/")[0] for steering in steerings} == set(STEERING_SUITES)
    chats = [steering.ask(request.text) for steering in steerings for request in requests]
    assert len({json.dumps(chat) for chat in chats}) == len(steerings) * len(requests)
    assert all(chat[-1]["role"] == "user" and REQUEST not in str(chat) for chat in chats)
    assert read_steerings("equivalent")[0].ask("Why {x}?") == [{"role": "user", "content": "Why {x}?"}]
    assert len(read_steerings("role_swap")) == sum(s.name.startswith("role_swap/") for s in steerings)


def test_clusters_and_stances():
    clusters, stances = read_clusters(), read_stances()
    assert all(len(set(cluster.paraphrases)) == 4 and cluster.reply for cluster in clusters)
    assert {stance.held for stance in stances} == {
        stance.opposite for stance in stances
    }  # neither reply is the good one


def test_a_file_of_ones_own(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"name": "a", "messages": [{"role": "user", "content": "So: {request}"}]}\n\n')
    assert read_steerings(file)[0].name == "mine/a"


CHAT = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    "read, rows, message",
    [
        (read_requests, [], "is empty"),
        (read_requests, [{"name": "a"}], "line 1 has no 'request'"),
        (read_requests, [{"name": "a", "request": "x"}, {"name": "b", "request": " "}], "line 2: expected a text"),
        (read_requests, [{"name": "a", "request": "x"}] * 2, "line 2: the name 'a' is there twice"),
        (read_requests, [["a"]], "line 1: "),
        (read_steerings, [{"name": "a", "messages": CHAT}], "expected {request} once"),
        (read_steerings, [{"name": "a", "messages": [{"role": "user", "content": "{request}{request}"}]}], "once"),
        (read_steerings, [{"name": "a", "messages": []}], "at least one, got"),
        (read_steerings, [{"name": "a", "messages": [{"role": "user"}]}], "has no 'content'"),
        (read_clusters, [{"name": "a", "paraphrases": ["x", "x"], "reply": "y"}], "two different texts"),
        (read_clusters, [{"name": "a", "paraphrases": "xy", "reply": "y"}], "expected a list"),
        (read_stances, [{"name": "a", "messages": CHAT, "held": "x", "opposite": "x"}], "two different replies"),
    ],
)
def test_faulty_lines_are_named(tmp_path, read, rows, message):
    file = tmp_path / "suite.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=f"suite.jsonl.*{message}"):
        read(file)


def test_a_missing_file_and_what_is_not_json(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.*equivalent, jailbreak"):
        read_steerings("nowhere")
    file = tmp_path / "suite.jsonl"
    file.write_text("{")
    with pytest.raises(ValueError, match="line 1: "):
        read_requests(file)
