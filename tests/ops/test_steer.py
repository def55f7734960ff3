import torch

from lockin_fast import steer_


def test_by_hand():
    h = torch.ones(3, 2, 2)
    directions = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert steer_(h, directions, torch.tensor([0, -1, 1]), torch.tensor([10.0, 1.0, 1.0])) is h
    assert h.tolist() == [[[7.0, 9.0]] * 2, [[1.0, 1.0]] * 2, [[1.0, 1.0]] * 2]
