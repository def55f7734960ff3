// Pre-activations of a few token rows against all latent rows: out[r][k] = rows[r] . weight[k], fp32 accumulation.
//
// A register tile holds kRows x C accumulators, so that every loaded operand serves several products. Row chunks of
// kChunkBytes stay in L1 while the latent rows stream past from L2, and the next rows are fetched meanwhile. One
// (row, latent) pair is always summed in the same order, whatever tile it falls into.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace lockin_fast {
namespace {

#if LOCKIN_FAST_LEVEL >= 3
constexpr int kRows = 4, kColumns = 5;  // 20 accumulators of 32 registers
#else
constexpr int kRows = 2, kColumns = 4;  // 8 accumulators of 16 registers
#endif
constexpr int kGroups = 8;  // column groups whose accumulators are kept between chunks
constexpr int64_t kChunkBytes = 2048;
constexpr int64_t kLineBytes = 64;

template <class T>
struct Rows {
  const T* row[kRows];
  int count;  // valid rows; the others repeat a valid one
};

LOCKIN_FAST_LOCAL void prefetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kLineBytes) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
}

template <int C, class T>
LOCKIN_FAST_LOCAL void accumulate_tile(const Rows<T>& rows, int64_t offset, const T* weight, int64_t weight_stride,
                                       int64_t n, Vec* state) {
  using Operand = DotOperand<T>;
  Vec acc[kRows][C];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < C; ++c) acc[r][c] = state[r * C + c];
  }
  int64_t i = 0;
  for (; i + Operand::step <= n; i += Operand::step) {
    Operand w[C];
    for (int c = 0; c < C; ++c) w[c] = Operand::read(weight + c * weight_stride + i);
    for (int r = 0; r < kRows; ++r) {
      const Operand x = Operand::read(rows.row[r] + offset + i);
      for (int c = 0; c < C; ++c) acc[r][c] = multiply_add(x, w[c], acc[r][c]);
    }
  }
  if (i < n) {
    for (int c = 0; c < C; ++c) {
      const Operand w = Operand::read_first(weight + c * weight_stride + i, n - i);
      for (int r = 0; r < kRows; ++r) {
        acc[r][c] = multiply_add(Operand::read_first(rows.row[r] + offset + i, n - i), w, acc[r][c]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < C; ++c) state[r * C + c] = acc[r][c];
  }
}

template <class T>
LOCKIN_FAST_LOCAL void accumulate(int columns, const Rows<T>& rows, int64_t offset, const T* weight,
                                  int64_t weight_stride, int64_t n, Vec* state) {
  switch (columns) {
    case 1: return accumulate_tile<1>(rows, offset, weight, weight_stride, n, state);
    case 2: return accumulate_tile<2>(rows, offset, weight, weight_stride, n, state);
    case 3: return accumulate_tile<3>(rows, offset, weight, weight_stride, n, state);
#if LOCKIN_FAST_LEVEL >= 3
    case 4: return accumulate_tile<4>(rows, offset, weight, weight_stride, n, state);
#endif
    default: return accumulate_tile<kColumns>(rows, offset, weight, weight_stride, n, state);
  }
}

// out[r] points at K floats for each valid row.
template <class T>
void row_products(const EncodeArgs& args, const Rows<T>& rows, const Rows<T>& next, float* const* out) {
  constexpr int64_t chunk = kChunkBytes / static_cast<int64_t>(sizeof(T));
  const T* weight = static_cast<const T*>(args.weight);
  Vec state[kGroups][kRows * kColumns];
  for (int64_t k0 = 0; k0 < args.latents; k0 += kGroups * kColumns) {
    const int64_t left = args.latents - k0 < kGroups * kColumns ? args.latents - k0 : kGroups * kColumns;
    const int groups = static_cast<int>((left + kColumns - 1) / kColumns);
    for (int g = 0; g < groups; ++g) {
      for (Vec& lane : state[g]) lane = zeros();
    }
    for (int64_t offset = 0; offset < args.width; offset += chunk) {
      const int64_t n = args.width - offset < chunk ? args.width - offset : chunk;
      for (int g = 0; g < groups; ++g) {
        if (k0 == 0) {
          for (int r = g; r < next.count; r += groups) prefetch(next.row[r] + offset, n * sizeof(T));
        }
        const int64_t k = k0 + g * kColumns;
        const int columns = static_cast<int>(args.latents - k < kColumns ? args.latents - k : kColumns);
        accumulate(columns, rows, offset, weight + k * args.weight_stride + offset, args.weight_stride, n, state[g]);
      }
    }
    for (int g = 0; g < groups; ++g) {
      const int64_t k = k0 + g * kColumns;
      const int columns = static_cast<int>(args.latents - k < kColumns ? args.latents - k : kColumns);
      for (int r = 0; r < rows.count; ++r) {
        for (int c = 0; c < columns; ++c) out[r][k + c] = sum(state[g][r * columns + c]);
      }
    }
  }
}

// Collects up to kRows tokens of [*token, end) that the mask keeps, and moves *token past them.
LOCKIN_FAST_LOCAL int next_tokens(const bool* mask, int64_t* token, int64_t end, int64_t* tokens) {
  int count = 0;
  for (; *token < end && count < kRows; ++*token) {
    if (!mask || mask[*token]) tokens[count++] = *token;
  }
  return count;
}

template <class T>
LOCKIN_FAST_LOCAL Rows<T> rows_of(const void* data, int64_t stride, const int64_t* tokens, int count) {
  Rows<T> rows;
  rows.count = count;
  for (int r = 0; r < kRows && count > 0; ++r) {
    rows.row[r] = static_cast<const T*>(data) + tokens[r < count ? r : count - 1] * stride;
  }
  return rows;
}

}  // namespace
}  // namespace lockin_fast
