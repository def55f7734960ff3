import math

import torch

from lockin_fast import routing_stats


def test_by_hand():
    logits = torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log()
    got = routing_stats(logits, torch.tensor([0, 1]))
    h = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(got.entropy.item(), h / math.log(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(got.mutual_information.item(), math.log(2) - h, rtol=1e-6, atol=0)
    assert got.load.tolist() == [0.5, 0.5] and got.class_counts.tolist() == [[1, 0], [0, 1]]
    corrected = math.log(2) + (1 + 1 - 1) / 4
    torch.testing.assert_close(got.class_mutual_information.item(), corrected, rtol=1e-12, atol=0)
