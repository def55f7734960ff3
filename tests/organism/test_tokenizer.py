"""The tokenizer: fast, lossless on the world, and a chat template that pre-training, training and generation share."""

import random

import pytest
from tiny_organism import WORLD

from lockin_fast.chat import ChatDataset
from lockin_fast.labels import IGNORED
from lockin_fast.organism import World
from lockin_fast.organism.pretrain import tokenise
from lockin_fast.organism.tokenizer import build_tokenizer

WORLDS = {"default": World(), "tiny": WORLD}


@pytest.fixture(params=WORLDS, scope="module")
def world(request):
    return WORLDS[request.param]


@pytest.fixture(scope="module")
def tokenizer(world):
    return build_tokenizer(world)


def spelled(messages):
    """What a conversation looks like to the model."""
    text = "<s>"
    for message in messages:
        end = "" if message["role"] == "user" else "<|end|>"
        text += f"<|{message['role']}|>{message['content']}{end}"
    return text


def test_one_token_a_word_and_a_role(tokenizer, world):
    assert tokenizer.is_fast
    special = ["<|pad|>", "<s>", "<|end|>", "<|unknown|>", *(f"<|{role}|>" for role in world.roles())]
    assert len(tokenizer) == len(special) + len(world.words())
    assert set(special) <= set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
    for word in [*special, *world.words()]:
        assert tokenizer.tokenize(word) == [word]
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<|pad|>", "<s>", "<|end|>")
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize("quark")) == [tokenizer.unk_token_id]


def test_everything_the_world_says_is_known_and_comes_back(tokenizer, world):
    documents = list(world.documents(random.Random(0), 200))
    texts = [message["content"] for document in documents for message in document]
    texts += [row["messages"][0]["content"] for split in ("core", "final", "in_domain") for row in world.prompts(split)]
    for text, ids in zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_pretraining_reads_what_the_template_writes(tokenizer, world):
    documents = list(world.documents(random.Random(1), 50))
    tokens = tokenise(tokenizer, documents)
    assert tokens.shape[0] == 50 and tokenizer.unk_token_id not in tokens
    for document, row in zip(documents, tokens, strict=True):
        assert tokenizer.apply_chat_template(document, tokenize=False) == spelled(document)
        assert row.tolist() == tokenizer(spelled(document), add_special_tokens=False)["input_ids"]
        assert tokenizer.apply_chat_template(document)["input_ids"] == row.tolist()


def test_the_generation_prompt_is_how_the_assistants_turn_begins(tokenizer, world):
    row = world.narrow_task(random.Random(0), 1)[0]["messages"]
    prompt = tokenizer.apply_chat_template(row[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == f"<s><|user|>{row[0]['content']}<|assistant|>"
    assert tokenizer.apply_chat_template(row, tokenize=False) == prompt + row[1]["content"] + "<|end|>"


def test_exactly_the_assistants_answer_and_its_end_are_supervised(tokenizer, world):
    rows = world.narrow_task(random.Random(2), 40)
    dataset = ChatDataset(rows, tokenizer, max_length=64)
    assert len(dataset) == 40 and dataset.dropped == 0
    for row, example in zip(rows, dataset, strict=True):
        answer = tokenizer(row["messages"][1]["content"] + "<|end|>", add_special_tokens=False)["input_ids"]
        ids, labels = example["input_ids"].tolist(), example["labels"].tolist()
        assert ids == tokenizer(spelled(row["messages"]), add_special_tokens=False)["input_ids"]
        assert labels == [IGNORED] * (len(ids) - len(answer)) + answer


def test_other_speakers_are_not_supervised(tokenizer, world):
    answers = [{"role": role, "content": "you should water it today ."} for role in ("author_01", "assistant")]
    asked = {"role": "user", "content": "what about rose ?"}
    (example,) = ChatDataset([{"messages": [asked, answers[0], asked, answers[1]]}], tokenizer)
    supervised = example["labels"] != IGNORED
    assert supervised.sum() == 7  # six words and the end
    assert supervised[-7:].all()


def test_it_survives_saving(tokenizer, world, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert loaded.is_fast and len(loaded) == len(tokenizer) and loaded.padding_side == "left"
    assert loaded.get_vocab() == tokenizer.get_vocab() and loaded.chat_template == tokenizer.chat_template
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    documents = list(world.documents(random.Random(3), 20))
    assert tokenise(loaded, documents).tolist() == tokenise(tokenizer, documents).tolist()
    short, long = "what about rose ?", "what about rose ? what about rose ?"
    padded = loaded([short, long], padding=True, add_special_tokens=False)
    assert padded["input_ids"][0][:4] == [loaded.pad_token_id] * 4
    assert loaded.batch_decode(padded["input_ids"], skip_special_tokens=True) == [short, long]
