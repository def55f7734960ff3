"""Faults in the CUDA kernels, which the emulator's tests have to notice: it shows races and what no barrier guards.

Not here: what the emulator replaces (launch.h, the inline assembly of mma.h), and barriers that only grids of more than
65536 blocks need.
"""


def faults(file, *changes, tests=None):
    """`changes` (old, new) to a file of csrc/cuda, which the op's tests on the emulated kernels have to notice."""
    selection = f"emulated_kernels[{tests or file.partition('.')[0]}]"
    return [(f"csrc/cuda/{file}", old, new, "tests/cuda/test_cuda_kernels.py", selection) for old, new in changes]


def faults_of_penalty(file, *changes):
    """The same, noticed by the tests of block_penalty that are about threads, grids and alignment."""
    selection = "test_block_penalty"
    return [(f"csrc/cuda/{file}", old, new, "tests/cuda/test_cuda_kernels.py", selection) for old, new in changes]


MUTATIONS = [
    *faults(
        "access.h",
        ("static_cast<uintptr_t>(stride_bytes | row_bytes)", "static_cast<uintptr_t>(stride_bytes)"),
        ("static_cast<uintptr_t>(stride_bytes | row_bytes)", "static_cast<uintptr_t>(row_bytes)"),
        ("reinterpret_cast<uintptr_t>(data) |", ""),
        ("(row_bytes + kPieceBytes - 1) / kPieceBytes", "row_bytes / kPieceBytes"),
        ("(rows + kWarpsPerBlock - 1) / kWarpsPerBlock", "rows / kWarpsPerBlock"),
        tests="patch",
    ),
    *faults_of_penalty(
        "penalty_rows.h",
        ("return token < p.tokens && (!p.mask || p.mask[token]);", "return token < p.tokens;"),
        ("warp < kWarpsPerBlock; warp += launch.tiles", "warp < launch.tiles; warp += launch.tiles"),
        ("int distance = kWarp / 2", "int distance = kWarp / 4"),
        ("if (all) atomicAdd(p.active, all);", "if (all) *p.active = all;"),
    ),
    *faults(
        "penalty_rows.h",
        ("p.margin ? p.margin[k] : 0.0f", "p.margin ? -p.margin[k] : 0.0f"),
        ("tokens[r] * p.h_ref_stride", "tokens[r] * p.h_stride"),
        ("pair.coefficient * p.unit", "pair.coefficient"),
        tests="block_penalty",
    ),
    *faults_of_penalty(
        "block_penalty.cu",
        ("const int64_t k = k0 + 8 * n + g;", "const int64_t k = k0 + 8 * n + g + 1;"),
        (
            "{low.word[0], high.word[0], low.word[1], high.word[1]}",
            "{low.word[0], low.word[1], high.word[0], high.word[1]}",
        ),
        (
            "__syncthreads();  // the sums before were read\n#pragma unroll\n      for (int s = 0;",
            "#pragma unroll\n      for (int s = 0;",
        ),
    ),
    *faults(
        "latent_backward.cu",
        ("of[r] = coefficient == 0.0f ? 0.0f : p.scale", "of[r] = p.scale"),
        ("const int k = __ffs(left) - 1;", "const int k = __ffs(left) % kWarp;"),
        ("if (in_place && all_quiet) return;", "if (all_quiet) return;"),
    ),
    *faults(
        "patch.cu",
        ("row < 0 || row >= p.tokens", "row <= 0 || row >= p.tokens"),
        ("i * p.source_stride", "i * p.row_bytes"),
        ("at < end; at += 2 * kWarp", "at < end - 2; at += 2 * kWarp"),
        ("if (at < bytes) *reinterpret_cast<Quad*>", "if (at + kQuadBytes < bytes) *reinterpret_cast<Quad*>"),
    ),
    *faults(
        "patch_diff.cu",
        ("row >= 0 && row < p.tokens", "row > 0 && row < p.tokens"),
    ),
]
