"""Faults in the CUDA kernels."""

MUTATIONS = [
    (
        "csrc/cuda/penalty_rows.h",
        "return token < p.tokens && (!p.mask || p.mask[token]);",
        "return token < p.tokens;",
        "tests/cuda/test_cuda_kernels.py",
        "not tests_of_the_ops",
    ),
    (
        "csrc/cuda/penalty_rows.h",
        "warp < kWarpsPerBlock; warp += launch.tiles",
        "warp < launch.tiles; warp += launch.tiles",
        "tests/cuda/test_cuda_kernels.py",
        "not tests_of_the_ops",
    ),
    (
        "csrc/cuda/block_penalty.cu",
        "const int64_t k = k0 + 8 * n + g;",
        "const int64_t k = k0 + 8 * n + g + 1;",
        "tests/cuda/test_cuda_kernels.py",
        "not tests_of_the_ops",
    ),
    (
        "csrc/cuda/block_penalty.cu",
        "{low.word[0], high.word[0], low.word[1], high.word[1]}",
        "{low.word[0], low.word[1], high.word[0], high.word[1]}",
        "tests/cuda/test_cuda_kernels.py",
        "not tests_of_the_ops",
    ),
    (
        "csrc/cuda/block_penalty.cu",
        "__syncthreads();  // the sums before were read\n#pragma unroll\n      for (int s = 0;",
        "#pragma unroll\n      for (int s = 0;",
        "tests/cuda/test_cuda_kernels.py",
        "not tests_of_the_ops",
    ),
    (
        "csrc/cuda/latent_backward.cu",
        "of[r] = coefficient == 0.0f ? 0.0f : p.scale",
        "of[r] = p.scale",
        "tests/cuda/test_cuda_kernels.py",
        "tests_of_the_ops_pass_on",
    ),
    (
        "csrc/cuda/latent_backward.cu",
        "const int k = __ffs(left) - 1;",
        "const int k = __ffs(left) % kWarp;",
        "tests/cuda/test_cuda_kernels.py",
        "tests_of_the_ops_pass_on",
    ),
    (
        "csrc/cuda/latent_backward.cu",
        "if (in_place && all_quiet) return;",
        "if (all_quiet) return;",
        "tests/cuda/test_cuda_kernels.py",
        "tests_of_the_ops_pass_on",
    ),
]
