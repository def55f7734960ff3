"""The key of a token: a function of its document up to it, and of nothing else."""

import pytest
import torch

from lockin_fast.cache.keys import token_keys

WORD = 2**64


def oracle(document):
    """The keys of a document in Python's integers."""
    keys, total = [], 0
    for position, token in enumerate(document):
        x = ((token << 32) + position + 1) * 0x9E3779B97F4A7C15 % WORD
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % WORD
        x = (x ^ x >> 27) * 0x94D049BB133111EB % WORD
        total = (total + (x ^ x >> 31)) % WORD
        keys.append(total)
    return keys


DOCUMENTS = [[5, 7, 7, 0, 128255], [5, 7, 7, 0], [7, 5], [0], [5, 7, 8, 0, 1, 2, 3]]


def test_the_keys_are_those_of_the_definition():
    for document in DOCUMENTS:
        assert token_keys(torch.tensor([document])).tolist() == [oracle(document)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_key(side):
    length = max(map(len, DOCUMENTS)) + 2
    ids, attention = torch.full((2, len(DOCUMENTS), length), 9).unbind(0)
    attention = torch.zeros_like(attention)
    for i, document in enumerate(DOCUMENTS):
        start = length - len(document) if side == "left" else 0
        ids[i, start : start + len(document)] = torch.tensor(document)
        attention[i, start : start + len(document)] = 1
    keys = token_keys(ids, attention)
    for i, document in enumerate(DOCUMENTS):
        assert keys[i][attention[i].bool().numpy()].tolist() == oracle(document)


@pytest.mark.parametrize("padded", [False, True])
def test_packed_documents_keep_their_keys(padded):
    ids = [token for document in DOCUMENTS for token in document]
    positions = [i for document in DOCUMENTS for i in range(len(document))]
    attention = torch.tensor([[0] * 2 + [1] * len(ids) + [0]]) if padded else None
    if padded:
        ids, positions = [0, 0, *ids, 0], [0, 1, *positions, 0]
    keys = token_keys(torch.tensor([ids]), attention, torch.tensor([positions]))[0]
    keys = keys[2:-1] if padded else keys
    assert keys.tolist() == [key for document in DOCUMENTS for key in oracle(document)]


def test_order_place_and_token_all_count():
    keys = token_keys(torch.tensor([[1, 2, 3], [2, 1, 3], [1, 3, 3], [1, 2, 3]]))
    assert keys[0].tolist() == keys[3].tolist()
    assert len({*keys[:, 2].tolist()}) == 3 and keys[0, 0] == keys[2, 0] and keys[0, 1] != keys[1, 1]


def test_shapes_are_checked():
    assert token_keys(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0)
    with pytest.raises(ValueError, match=r"input_ids: got shape \(3,\), expected \[B, S\]"):
        token_keys(torch.arange(3))
    with pytest.raises(ValueError, match=r"position_ids: got shape \(3, 1, 4\), expected \(1, 4\)"):
        token_keys(torch.zeros(1, 4, dtype=torch.int64), None, torch.zeros(3, 1, 4, dtype=torch.int64))
