"""Faults in the CPU kernels of NF4 and of rows that are copied, subtracted and steered, and in their conversions."""

from mutations.fault import faults

NF4 = [
    *faults(
        "csrc/cpu/nf4.cpp",
        "ops/test_nf4",
        ("scratch[args.channels[channel] - i] = T{};", ""),
        ("_mm512_cmp_ps_mask(x, boundary, _CMP_GT_OQ)", "_mm512_cmp_ps_mask(x, boundary, _CMP_GE_OQ)"),
        ("args.absmax + t * (args.width / args.blocksize)", "args.absmax + (t ^ 1) * (args.width / args.blocksize)"),
        ("if (*absmax < __builtin_inff()) {", "if (true) {"),
        ("_mm256_and_si256(bits, _mm256_set1_epi16(0x7fff))", "bits"),
        ("rows.channel_count == 0 &&", ""),
        ("outliers[channel] = row[args.channels[channel]];", "outliers[channel] = row[channel];"),
    ),
    *faults(
        "csrc/cpu/nf4.cpp",
        "ops/test_nf4",
        ("_mm256_permute4x64_epi64(mixed, 0xd8)", "mixed"),
        isa="avx2",
    ),
    *faults(
        "csrc/cpu/nf4.cpp",
        "ops/test_nf4",
        ("code[v] -= scaled[v].v > splat(boundary).v;", "code[v] -= scaled[v].v >= splat(boundary).v;"),
        isa="baseline",
    ),
    *faults(
        "csrc/cpu/nf4_decode.h",
        "ops/test_nf4",
        (
            "_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16)",
            "_mm512_srli_epi32(bytes, 3), _mm512_slli_epi32(bytes, 16)",
        ),
        (
            "_mm256_srli_epi32(bytes, 4), _mm256_slli_epi32(bytes, 16)",
            "_mm256_srli_epi32(bytes, 4), _mm256_slli_epi32(bytes, 15)",
        ),
        ("_mm512_add_epi32(even, _mm512_set1_epi32(0x7fff))", "_mm512_set1_epi32(0x8000)"),
        ("out[rows.channels[j]] = outliers[j];", "out[j] = outliers[j];"),
        ("static_cast<const T*>(rows.outliers) + token * rows.channel_count", "static_cast<const T*>(rows.outliers)"),
    ),
    *faults(
        "csrc/cpu/nf4_decode.h",
        "ops/test_nf4",
        ("_mm256_permute2x128_si256(first, second, 0x31)", "_mm256_permute2x128_si256(first, second, 0x13)"),
        isa="avx2",
    ),
    *faults(
        "csrc/common/nf4.h",
        "test_native",
        ("eight * 8u + four * 4u", "eight * 8u + two * 4u"),
        ("!(x <= nf4_boundary(7))", "x >= nf4_boundary(7)"),
        ("(absmax < kNf4Tiny ? kNf4Tiny : absmax)", "absmax"),
        ("even << 4 | odd", "odd << 4 | even"),
    ),
    *faults(
        "csrc/common/half.h",
        "test_native",
        ("bits >> 16 & 0x8000u", "bits >> 15 & 0x8000u"),
        ("if (x != x) {", "if (false) {"),
        ("bits + 0x7fffu + (bits >> 16 & 1u)", "bits + 0x8000u"),
        ("0xfffu + (magnitude >> 13 & 1u)", "0x1000u"),
        ("magnitude >= 0x477ff000u", "magnitude >= 0x477fe000u"),
    ),
]

ROWS = [
    *faults(
        "csrc/cpu/patch.cpp",
        "ops/test_patch",
        ("if (row < 0 || row >= args.tokens) continue;", "if (row < 0 || row >= args.tokens - 1) continue;"),
        ("args.source + p * args.source_stride", "args.source + row * args.source_stride"),
        ("memcpy(to, from, static_cast<size_t>(args.row_bytes));", "memcpy(to, from, args.row_bytes & ~63);"),
        ("if (row >= 0 && row < args.tokens) decode_row(source, p,", "if (row > 0) decode_row(source, p,"),
        ("decode_row(source, p,", "decode_row(source, begin,"),
    ),
    *faults(
        "csrc/cpu/stream.h",
        "ops/test_patch",
        ("memcpy(to, from, static_cast<size_t>(head));", ""),
        ("memcpy(to + i, from + i, static_cast<size_t>(bytes - i));", ""),
    ),
    *faults(
        "csrc/cpu/stream.h",
        "ops/test_patch",
        ("_mm256_stream_si256(reinterpret_cast<__m256i*>(to + i + kLine / 2), high);", ""),
        isa="avx2",
    ),
    *faults(
        "csrc/cpu/patch_diff.cpp",
        "ops/test_patch_diff",
        ("const Vec minus = splat(-1.0f);", "const Vec minus = splat(1.0f);"),
        ("if (i < n) store_first(out + i, fma(minus", "if (i + 1 < n) store_first(out + i, fma(minus"),
        (
            "activation(pre + moved[k], threshold) - activation(pre, threshold)",
            "activation(pre, threshold) - activation(pre + moved[k], threshold)",
        ),
        ("change[k] + args.bias[k]", "change[k]"),
        ("fill_nan(args.norm + p, 1);", ""),
        ("args.source) + p * args.source_stride", "args.source) + r * args.source_stride"),
        ("if (i < args.width) store_first(to + i", "if (i + 1 < args.width) store_first(to + i"),
    ),
    *faults(
        "csrc/cpu/norm.h",
        "ops/test_patch_diff",
        ("fast >= kSmallestSquares && ", ""),
        ("fast <= kLargestSquares", "fast <= __builtin_inff()"),
        ("for (; i < n; ++i) sum += v[i] * v[i];", ""),
    ),
    *faults(
        "csrc/cpu/steer.cpp",
        "ops/test_steer",
        ("if (length == 0.0) return {nullptr, 0.0f};", ""),
        ("args.coefficient[r] == 0.0f || ", ""),
        ("size >= kSmallestScale && ", ""),
        ("args.coefficient[r] / length", "args.coefficient[r] * length"),
        ("int64_t s = token - r * args.positions;", "int64_t s = 0;"),
        ("if (i < n) store_first(h + i", "if (i + 1 < n) store_first(h + i"),
        ("return {room, 1.0f};", "return {room, static_cast<float>(scale)};"),
    ),
]

VECTORS = [
    *faults(
        "csrc/cpu/vec.h",
        "ops/test_steer",
        ("_mm512_mask_or_epi32(sum, nan, bits, _mm512_set1_epi32(0x400000))", "sum"),
        ("_mm512_add_epi32(even, _mm512_set1_epi32(0x7fff))", "_mm512_set1_epi32(0x8000)"),
        isa="avx512",
    ),
    *faults(
        "csrc/cpu/vec.h",
        "ops/test_steer",
        ("_mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT)", "_mm512_cvtps_ph(a.v, _MM_FROUND_TO_ZERO)"),
    ),
    *faults(
        "csrc/cpu/vec.h",
        "ops/test_steer",
        ("_mm256_blendv_epi8(sum, quiet, nan)", "sum"),
        ("_mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT)", "_mm256_cvtps_ph(a.v, _MM_FROUND_TO_ZERO)"),
        isa="avx2",
    ),
]

MUTATIONS = [*NF4, *ROWS, *VECTORS]
