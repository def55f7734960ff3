"""Position sets: which tokens a role's turns are, under templates of several manners."""

import pytest
import tiny_llama

from lockin_fast.patching.spans import PromptTokens, check_positions, covers_reply, render

CHAT = [
    {"role": "system", "content": "w1 w2"},
    {"role": "user", "content": "w3"},
    {"role": "assistant", "content": "w4 w5"},
    {"role": "user", "content": "w6 w7 w8"},
]


def words(prompt, name):
    tokenizer = tiny_llama.tokenizer()
    return tokenizer.convert_ids_to_tokens([prompt.ids[position] for position in prompt.positions(name)])


def test_every_token_is_of_the_role_whose_turn_it_stands_in():
    prompt = render(tiny_llama.tokenizer(), CHAT)
    assert words(prompt, "system") == ["<system>", "w1", "w2"]
    assert words(prompt, "user") == ["<user>", "w3", "<user>", "w6", "w7", "w8"]
    assert words(prompt, "assistant") == ["<assistant>", "w4", "w5", "<end>", "<assistant>"]
    assert words(prompt, "prefix") == words(prompt, "all") and len(prompt.positions("prefix")) == len(prompt.ids)
    assert words(prompt, "last") == ["<assistant>"] and prompt.positions("generated") == []


@pytest.mark.parametrize(
    ("name", "expected"), [("2..4", [2, 3]), ("..3", [0, 1, 2]), ("-2..", [4, 5]), ("1..-3", [1, 2]), ("9..", [])]
)
def test_ranges_are_those_of_python(name, expected):
    assert PromptTokens(range(6), None).positions(name) == expected


def test_a_preamble_is_the_first_messages():
    template = "{{ '<s> ' }}" + tiny_llama.TEMPLATE
    assert words(render(tiny_llama.tokenizer(template), CHAT[1:2]), "user") == ["<s>", "<user>", "w3"]


def test_a_template_that_rewrites_turns_has_positions_but_no_roles():
    template = "{{ messages | length }} " + tiny_llama.TEMPLATE
    prompt = render(tiny_llama.tokenizer(template), CHAT)
    assert prompt.positions("last") == [len(prompt.ids) - 1]
    with pytest.raises(ValueError, match="user: the tokenizer's chat template renders turns differently"):
        prompt.positions("user")


def test_a_slow_tokenizer_is_refused(monkeypatch):
    tokenizer = tiny_llama.tokenizer()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match="tokenizer: .* is a slow one"):
        render(tokenizer, CHAT)


@pytest.mark.parametrize("name", ["somewhere", "..", "3:8", "a..b", ""])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="expected prefix, last, generated, all, system, user, assistant, or a range"):
        check_positions(name)


def test_what_covers_the_reply():
    assert [name for name in ("prefix", "last", "generated", "all", "user", "1..2") if covers_reply(name)] == [
        "generated", "all",
    ]  # fmt: skip
