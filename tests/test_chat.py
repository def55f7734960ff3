"""Chat JSONL: what is read, what is supervised, how it is padded, and what is refused."""

import json

import pytest
import tiny_llama as tiny
import torch

from lockin_fast.chat import ChatDataset, PaddingCollator, read_chat

TWO_TURNS = {
    "messages": [
        {"role": "user", "content": "w1 w2"},
        {"role": "assistant", "content": "w3"},
        {"role": "user", "content": "w4"},
        {"role": "assistant", "content": "w5 w6"},
    ],
    "domain": "food",
}
TWO_TURNS_TEXT = "<user> w1 w2 <assistant> w3 <end> <user> w4 <assistant> w5 w6 <end>".split()


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("template", [tiny.TEMPLATE, tiny.MARKED_TEMPLATE])
def test_assistant_turns_alone_are_supervised(tmp_path, template):
    tokenizer = tiny.tokenizer(template)
    (row,) = ChatDataset(write(tmp_path / "chat.jsonl", TWO_TURNS, "\n"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == TWO_TURNS_TEXT
    supervised = row["labels"] != -100
    assert torch.equal(row["labels"][supervised], row["input_ids"][supervised])
    spoken = tokenizer.convert_ids_to_tokens(row["input_ids"][supervised])
    assert spoken == ["w3", "<end>", "w5", "w6", "<end>"]


def test_both_ways_to_find_assistant_tokens_agree():
    rows = tiny.conversations(20)
    by_prefix = ChatDataset(rows, tiny.tokenizer())
    by_marker = ChatDataset(rows, tiny.tokenizer(tiny.MARKED_TEMPLATE))
    assert len(by_prefix) == len(by_marker) == 20
    for mine, theirs in zip(by_prefix, by_marker, strict=True):
        assert torch.equal(mine["input_ids"], theirs["input_ids"]) and torch.equal(mine["labels"], theirs["labels"])


def test_rows_are_cut_and_those_left_with_nothing_to_learn_dropped():
    short = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3 w4"}]}
    long_question = {
        "messages": [{"role": "user", "content": "w1 " * 9}, {"role": "assistant", "content": "w2"}],
    }
    dataset = ChatDataset([long_question, short], tiny.tokenizer(), max_length=5)
    assert len(dataset) == 1 and dataset.dropped == 1 and len(dataset[0]["input_ids"]) == 5
    with pytest.raises(ValueError, match="all labels are masked: none of the 1 conversations .* max_length=5"):
        ChatDataset([long_question], tiny.tokenizer(), max_length=5)


def test_padding():
    batch = PaddingCollator(7)([
        {"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([-100, 2, 3])},
        {"input_ids": torch.tensor([4]), "labels": torch.tensor([4])},
    ])  # fmt: skip
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nonsense\n", "line 2 is not JSON"),
        ('{"text": "a"}\n', "line 2 has no messages"),
        ('{"messages": []}\n', "line 2 has no messages"),
        ("[1]\n", "line 2 has no messages"),
        ('{"messages": [{"role": "user"}]}\n', "line 2 has the message .* expected a role and a content"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    with pytest.raises(ValueError, match=f"chat.jsonl, {message}"):
        read_chat(write(tmp_path / "chat.jsonl", TWO_TURNS, line))


def test_missing_and_empty_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*absent.jsonl"):
        read_chat(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="empty.jsonl is empty"):
        read_chat(write(tmp_path / "empty.jsonl", "\n"))
    with pytest.raises(ValueError, match="got no conversations"):
        ChatDataset([], tiny.tokenizer())


def test_conversations_without_an_assistant_are_refused():
    with pytest.raises(ValueError, match="all labels are masked"):
        ChatDataset([{"messages": [{"role": "user", "content": "w1"}]}], tiny.tokenizer())


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(ValueError, match="has no chat template"):
        ChatDataset([TWO_TURNS], tiny.tokenizer(None))


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_marked():
    # Writes the turn's distance from the end, so a prefix of the conversation is no prefix of the text.
    rewriting = "{% for m in messages %}{{ 'w' ~ loop.revindex ~ ' ' ~ m['content'] ~ ' ' }}{% endfor %}"
    with pytest.raises(ValueError, match="renders conversation 0 differently once more turns follow"):
        ChatDataset([TWO_TURNS], tiny.tokenizer(rewriting))
