"""steer_ adds to a batch at the speed of a copy of its bytes, a direction of its own for every row."""

import torch

import lockin_fast
from benchmarks.case import Case, Work


def work(rows, positions, width, latents=64):
    torch.manual_seed(0)
    h = torch.randn(rows, positions, width).bfloat16()
    directions = torch.randn(latents, width)
    index = torch.randint(0, latents, (rows,))
    coefficient = torch.full((rows,), 1e-3)

    def eager():
        chosen = directions[index]
        unit = chosen / chosen.norm(dim=1, keepdim=True)
        return h.add_((unit * coefficient[:, None])[:, None].to(h.dtype))

    providers = {
        "eager, in place": eager,
        "torch.compile": torch.compile(eager),
        "steer_": lambda: lockin_fast.steer_(h, directions, index, coefficient),
    }
    touched = 4 * h.numel() + 4 * width * min(rows, latents)
    return Work(providers, ("steer_",), touched)


def cases():
    for rows, positions, label in (
        (16, 128, "16 prompts of 128"),
        (2048, 1, "2,048 rows of one position"),
        (64, 1, "a decoding step of 64"),
    ):
        shape = {"R": rows, "S": positions, "d": 4096, "dtype": torch.bfloat16}
        yield Case(label, shape, lambda r=rows, s=positions: work(r, s, 4096), ("steer_",), 50)
