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
        ("of_warp[threadIdx.x / kWarp] = pairs;\n  __syncthreads();", "of_warp[threadIdx.x / kWarp] = pairs;"),
    ),
    *faults(
        "penalty_rows.h",
        ("k0 == 0 ? value : p.per_token[token] + value", "value"),
        ("p.margin ? p.margin[k] : 0.0f", "p.margin ? -p.margin[k] : 0.0f"),
        ("tokens[r] * p.h_ref_stride", "tokens[r] * p.h_stride"),
        ("pair.coefficient * p.unit", "pair.coefficient"),
        tests="block_penalty",
    ),
    *faults(
        "penalty_rows.h",
        ("h[r] ? nf4.read(tokens[r], c) : Quad{}", "h[r] ? nf4.read(tokens[0], c) : Quad{}"),
        ("if (kReference == Reference::nf4) nf4.seek(c);", "nf4.seek(c + 1);"),
        tests="block_penalty_nf4",
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
        ("__syncthreads();\n      const int64_t end", "const int64_t end"),
        (
            "__syncthreads();\n    pairs += finish(launch, sums, k0, count);",
            "pairs += finish(launch, sums, k0, count);",
        ),
        ("__shfl_xor_sync(kAll, away, kBit)", "__shfl_xor_sync(kAll, away, kBit ^ 3)"),
        ("away = upper ? x[i] : x[i + kHalf]", "away = upper ? x[i + kHalf] : x[i]"),
        ("__any_sync(kAll, rows.some)", "rows.some"),
        ("p.latents - k0);", "p.latents - k0 - 1);"),
    ),
    *faults(
        "block_penalty.cu",
        (
            "fill_nf4_table(table);\n  __syncthreads();\n"
            "  for (int64_t k0 = 0; k0 < p.latents; k0 += launch.latents) {\n    Rows<T, kReference, true, 2>",
            "fill_nf4_table(table);\n"
            "  for (int64_t k0 = 0; k0 < p.latents; k0 += launch.latents) {\n    Rows<T, kReference, true, 2>",
        ),
        tests="block_penalty_nf4",
    ),
    *faults(
        "block_penalty.cu",
        ("next = rows.read(c + shares * kStep);", "next = rows.read(c + kStep);"),
        tests="block_penalty",
    ),
    *faults(
        "latent_backward.cu",
        ("of[r] = coefficient == 0.0f ? 0.0f : p.scale", "of[r] = p.scale"),
        ("const int k = __ffs(left) - 1;", "const int k = __ffs(left) % kWarp;"),
        ("if (in_place && all_quiet) return;", "if (all_quiet) return;"),
        ("__shfl_sync(kAll, factors.of[r], k)", "__shfl_sync(kAll, factors.of[r], k ^ 1)"),
        ("if (p.latents > kWarp) factors = Factors(p, first, k0);", ""),
        ("(first + r) * p.grad_stride", "(first + r) * p.out_stride"),
        ("quad < kQuadsPerPart; ++quad", "quad < kQuadsPerPart - 1; ++quad"),
    ),
    *faults(
        "nf4.cu",
        ("of[i] = 0;\n    __syncthreads();", "of[i] = 0;"),
        ("of[column] = 1;\n    }\n    __syncthreads();", "of[column] = 1;\n    }"),
        ("distance < lanes; distance *= 2", "distance < lanes / 2; distance *= 2"),
        ("blocksize < together * kStride<T>", "blocksize <= together * kStride<T>"),
        ("nf4_pack(even, odd)", "nf4_pack(odd, even)"),
        ("flags[i * kStride<T> + j]", "flags[i * kStride<T> + (j ^ 1)]"),
        ("fill_nf4_table(table);\n  __syncthreads();", "fill_nf4_table(table);"),
        ("words[i] >> (4 * j ^ 4)", "words[i] >> (4 * j)"),
        ("row * nf4.outlier_count", "0 * nf4.outlier_count"),
        ("if (columns > kPiece<T>) read_piece", "if (columns < kPiece<T>) read_piece"),
    ),
    *faults("nf4.cu", ("to < 0 || to >= p.out_rows", "to <= 0 || to >= p.out_rows"), tests="patch"),
    *faults(
        "patch.cu",
        ("row < 0 || row >= p.tokens", "row <= 0 || row >= p.tokens"),
        ("i * p.source_stride", "i * p.row_bytes"),
        ("row * p.h_stride", "row * p.row_bytes"),
        ("at < end; at += 2 * kWarp", "at < end - 2; at += 2 * kWarp"),
        ("if (at < bytes) *reinterpret_cast<Quad*>", "if (at + kQuadBytes < bytes) *reinterpret_cast<Quad*>"),
    ),
    *faults(
        "patch_diff.cu",
        ("row >= 0 && row < p.tokens", "row > 0 && row < p.tokens"),
        ("int distance = kWarp / 2", "int distance = kWarp / 4"),
        ("(first + r) * p.source_stride", "(first + r) * p.width"),
        ("(latent + k) * p.weight_stride", "latent * p.weight_stride"),
        ("activation(pre + diff, threshold) - activation(pre, threshold)", "activation(pre + diff, threshold) - pre"),
        ("p.threshold[latent + k]", "p.threshold[latent]"),
        ("p.bias[latent + k]", "p.bias[latent]"),
        ("latent < p.latents || latent == 0", "latent < p.latents"),
        ("tile.inside[r] ? change :", "true ? change :"),
        ("fma(static_cast<double>(diff), static_cast<double>(diff), sums", "fma(diff * diff, 1.0, sums"),
    ),
    *faults(
        "rows.h",
        (
            "if (c + i < width) set_element(&quad, i, row[c + i]);",
            "if (c + i + 1 < width) set_element(&quad, i, row[c + i]);",
        ),
        ("if (c + i < width) row[c + i] = stored", "if (c + i + 1 < width) row[c + i] = stored"),
        ("static_cast<uint32_t>(x.bits) << 16 * (i % 2)", "static_cast<uint32_t>(x.bits) << 16 * (1 - i % 2)"),
        tests="latent_backward",
    ),
    *faults(
        "rows.h",
        ("threadIdx.x < kNf4Codes", "threadIdx.x < kNf4Codes - 1"),
        ("rows.channels[next] < c)", "rows.channels[next] <= c)"),
        ("rows.channels[n] < c + kCount; ++n", "rows.channels[n] < c + kCount - 1; ++n"),
        ("(i % 2 ? 0 : 4)", "(i % 2 ? 4 : 0)"),
        ("token * rows.outlier_count + n", "token * rows.outlier_count"),
        ("token * (width / rows.blocksize)", "0 * (width / rows.blocksize)"),
        tests="block_penalty_nf4",
    ),
    *faults(
        "steer.cu",
        ("int distance = kWarp / 2", "int distance = kWarp / 4"),
        ("of_warp[threadIdx.x / kWarp] = x;\n  __syncthreads();", "of_warp[threadIdx.x / kWarp] = x;"),
        ("if (norm == 0.0) continue;", ""),
        ("coefficient == 0.0f || which < 0", "which < 0"),
        ("which < 0 || which >= p.count", "which <= 0 || which >= p.count"),
        ("h + s * p.position_stride", "h + s * p.width"),
        ("which * p.direction_stride", "which * p.width"),
        ("squares = fma(x[i], x[i], squares)", "squares += static_cast<float>(x[i]) * static_cast<float>(x[i])"),
        ("s += kQuadsPerLane)", "s += kPositions)"),
    ),
]
