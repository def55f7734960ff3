import torch

from lockin_fast import patch_diff


def test_by_hand():
    h = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    source = torch.tensor([[6.0, 0.0]])
    got = patch_diff(
        h, torch.tensor([[0, 1]]), source, torch.tensor([[1.0, 1.0], [-1.0, 0.0]]), torch.tensor([-5.0, 4.0])
    )
    assert got.norm.tolist() == [5.0]
    assert got.projection.tolist() == [[-1.0, -3.0]]
    assert got.latents.tolist() == [[1.0 - 2.0, 0.0 - 1.0]]
