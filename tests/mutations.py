"""The faults that tests/mutate.py puts into the kernels: three or more of each, and who has to notice."""

MUTATIONS = [
    (
        "csrc/cpu/nf4.cpp",
        "scratch[args.channels[channel] - i] = T{};",
        "",
        "tests/ops/test_nf4.py",
    ),
    (
        "csrc/cpu/nf4.cpp",
        "_mm512_cmp_ps_mask(x, boundary, _CMP_GT_OQ)",
        "_mm512_cmp_ps_mask(x, boundary, _CMP_GE_OQ)",
        "tests/ops/test_nf4.py",
    ),
    (
        "csrc/cpu/nf4.cpp",
        "args.absmax + t * (args.width / args.blocksize)",
        "args.absmax + (t ^ 1) * (args.width / args.blocksize)",
        "tests/ops/test_nf4.py",
    ),
    (
        "csrc/cpu/nf4_decode.h",
        "_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16)",
        "_mm512_srli_epi32(bytes, 3), _mm512_slli_epi32(bytes, 16)",
        "tests/ops/test_nf4.py",
    ),
    (
        "csrc/cpu/nf4_decode.h",
        "out[rows.channels[j]] = outliers[j];",
        "out[j] = outliers[j];",
        "tests/ops/test_nf4.py",
    ),
    (
        "csrc/common/nf4.h",
        "eight * 8u + four * 4u",
        "eight * 8u + two * 4u",
        "tests/ops/test_nf4.py",
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
