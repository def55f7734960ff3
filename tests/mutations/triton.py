"""Faults in the Triton kernels."""

MUTATIONS = [
    (
        "lockin_fast/kernels/triton/block_penalty_nf4.py",
        "excess = s * (z - z_ref)",
        "excess = s * (z + z_ref)",
        "tests/ops/test_block_penalty_nf4.py",
        "not 2304 and not 4096",
    ),
    (
        "lockin_fast/kernels/triton/nf4.py",
        "& 0x7FFFFFFF",
        "",
        "tests/ops/test_nf4.py",
        "not 2304 and not 4096",
    ),
    (
        "lockin_fast/kernels/triton/nf4.py",
        "x = tl.where(column == tl.load(channels + j), 0.0, x)",
        "x = tl.where(column == tl.load(channels + j) + 1, 0.0, x)",
        "tests/ops/test_nf4.py",
        "not 2304 and not 4096",
    ),
    (
        "lockin_fast/kernels/triton/nf4.py",
        "tl.join(packed >> 4, packed)",
        "tl.join(packed, packed >> 4)",
        "tests/ops/test_nf4.py",
        "not 2304 and not 4096",
    ),
    (
        "lockin_fast/kernels/triton/encode_latents.py",
        "tokens < T, latents",
        "tokens < T - 1, latents",
        "tests/ops/test_encode_latents.py",
        "not 2304 and not 4096",
    ),
]
