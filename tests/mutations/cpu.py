"""Faults in the kernels of the CPU, in what they share with the others (csrc/common) and in the references."""

MUTATIONS = [
    (
        "csrc/cpu/block_penalty_nf4.cpp",
        "if (args.mask) moved.mask = args.mask + begin;",
        "moved.mask = nullptr;",
        "tests/ops/test_block_penalty_nf4.py",
    ),
    (
        "csrc/cpu/block_penalty_nf4.cpp",
        "args.encode.out + begin * args.encode.latents",
        "args.encode.out",
        "tests/ops/test_block_penalty_nf4.py",
    ),
    (
        "csrc/cpu/block_penalty_nf4.cpp",
        "decode_row(reference, t, decoded);",
        "decode_row(reference, begin, decoded);",
        "tests/ops/test_block_penalty_nf4.py",
    ),
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
        "csrc/common/penalty.h",
        "const float e = relu(sign * (z - z_ref) - margin);",
        "const float e = relu(sign * (z - z_ref) + margin);",
        "tests/ops/test_block_penalty.py",
    ),
    (
        "csrc/cpu/encode_topk.cpp",
        "if (key <= heap[child]) break;",
        "if (key >= heap[child]) break;",
        "tests/ops/test_encode_topk.py",
    ),
    (
        "csrc/cpu/encode_topk.cpp",
        "key_of(z[k], k0_ + k)",
        "key_of(z[k], k0_ + k + 1)",
        "tests/ops/test_encode_topk.py",
    ),
    (
        "csrc/cpu/encode_topk.cpp",
        "any |= !(z[k] <= floor);",
        "any |= z[k] > floor;",
        "tests/ops/test_encode_topk.py",
    ),
    (
        "csrc/ops_cpu/encode_topk.cpp",
        "kept.begin() + (s * tokens + t) * k",
        "kept.begin() + (s * tokens) * k",
        "tests/ops/test_encode_topk.py",
    ),
    (
        "csrc/cpu/wide_product.h",
        "if (!args.mask || args.mask[token]) tokens[count++] = token;",
        "tokens[count++] = token;",
        "tests/ops/test_latent_stats.py",
    ),
    (
        "csrc/cpu/wide_product.h",
        "use.begin(k_lot + k0, block.latents);",
        "use.begin(k_lot, block.latents);",
        "tests/ops/test_encode_topk.py",
    ),
    (
        "csrc/cpu/latent_stats.cpp",
        "static_cast<double>(z - z_ref)",
        "static_cast<double>(z + z_ref)",
        "tests/ops/test_latent_stats.py",
    ),
    (
        "csrc/cpu/latent_stats.cpp",
        "count_[k] += z > 0.0f;",
        "count_[k] += z >= 0.0f;",
        "tests/ops/test_latent_stats.py",
    ),
    (
        "lockin_fast/ops/encode_topk.py",
        "indices + part.start",
        "indices",
        "tests/ops/test_encode_topk.py",
    ),
]
