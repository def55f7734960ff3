"""What the makers of tests/sae/golden share: sizes, random weights, and the recording of a library's own results."""

from pathlib import Path

import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).parent / "golden"
D, F, T, K = 16, 48, 3, 7
GATE_MARGIN = 1e-4


def randomise(module, seed):
    """Weights of a trained SAE's magnitude, every bias and threshold away from zero, decoder rows of unequal norm."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(random_values(name, parameter.shape, generator))


def random_values(name, shape, generator):
    values = torch.randn(shape, generator=generator) * (0.35 if len(shape) > 1 else 0.2)
    if "threshold" in name:
        return values.abs() + 0.1
    return values - 1 if "gate" in name else values  # so that a gate shuts latents that the magnitude would let through


def activations(seed):
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1000 + seed)) * 2 + 0.3


def record(case, seed, load):
    """``load(dtype)`` gives encode and decode of the SAE in the case's directory, in that dtype (None = the file's)."""
    for attempt in range(100):
        x = activations(seed + 100 * attempt)
        encode, decode = load(None)
        with torch.no_grad():
            z = encode(x)
            x_hat = decode(z)
            encode, decode = load(torch.float64)
            z_fp64 = encode(x.double())
            x_hat_fp64 = decode(z_fp64)
            nudged = [encode(x.double() * (1 + step)) for step in (-GATE_MARGIN, GATE_MARGIN)]
        same_gates = all(((other > 0) == (z_fp64 > 0)).all() for other in (z, *nudged))
        if same_gates and (z_fp64 > 0).any() and (z_fp64 == 0).any():
            break
    else:
        raise RuntimeError(f"{case}: no input keeps clear of the gates")
    expected = {"x": x, "z": z, "z_fp64": z_fp64, "x_hat": x_hat, "x_hat_fp64": x_hat_fp64}
    expected = {name: tensor.contiguous().clone() for name, tensor in expected.items()}
    save_file(expected, GOLDEN / case / "expected.safetensors")
