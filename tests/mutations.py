"""The faults that tests/mutate.py puts into the kernels: three or more of each, and who has to notice."""

MUTATIONS = [
    (
        "csrc/common/penalty.h",
        "const float e = relu(sign * (z - z_ref) - margin);",
        "const float e = relu(sign * (z - z_ref) + margin);",
        "tests/ops/test_block_penalty.py",
    ),
    (
        "lockin_fast/kernels/triton/encode_latents.py",
        "tokens < T, latents",
        "tokens < T - 1, latents",
        "tests/ops/test_encode_latents.py",
        "not 2304 and not 4096",
    ),
]
