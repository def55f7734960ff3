// Pre-activations of a few token rows against all latent rows: out[r][k] = rows[r] . weight[k], fp32 accumulation.
//
// A register tile holds kRows x C accumulators, so that every loaded operand serves several products. The packed latent
// rows stream past from L2 for every tile of token rows, or for two of them, and the next token rows are fetched
// meanwhile: evenly, so that the memory is busy all the time, and from several rows in turn, so that the processor's
// own prefetcher follows them all. Whole rows as chunks measured best. One (row, latent) pair is always summed in the
// same order, whatever tile it falls into.
#pragma once

#include "encode_latents.h"
#include "vec.h"

namespace lockin_fast {
namespace {

#if LOCKIN_FAST_LEVEL >= 3
constexpr int kRows = 4, kColumns = 5;  // 20 accumulators of 32 registers
#else
constexpr int kRows = 2, kColumns = 4;  // 8 accumulators of 16 registers
#endif
constexpr int kGroups = 8;  // column groups whose accumulators are kept between chunks
constexpr int64_t kChunkBytes = 8192;

template <class T>
struct Rows {
  const T* row[kRows];
  int count;  // valid rows; the others repeat a valid one
};

constexpr int64_t kLineBytes = 64;

LOCKIN_FAST_LOCAL void prefetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kLineBytes) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
}

constexpr int64_t padded_width(int64_t width) { return (width + kWidthPadding - 1) / kWidthPadding * kWidthPadding; }

LOCKIN_FAST_LOCAL int columns_from(int64_t k, int64_t latents) {
  return static_cast<int>(latents - k < kColumns ? latents - k : kColumns);
}

// Packs the latent rows of column groups [first, last): within a group, step by step along the width, the operands of
// its C latents side by side; zeros past the width. Rows a power of two apart would otherwise compete for the same
// cache sets.
template <class T>
void pack_groups(const EncodeArgs& args, T* packed, int64_t first, int64_t last) {
  constexpr int64_t step = DotOperand<T>::step;
  const T* weight = static_cast<const T*>(args.weight);
  for (int64_t k = first * kColumns; k < last * kColumns && k < args.latents; k += kColumns) {
    const int columns = columns_from(k, args.latents);
    T* group = packed + k * padded_width(args.width);
    for (int64_t i = 0; i < args.width; i += step) {
      const int64_t n = args.width - i < step ? args.width - i : step;
      for (int c = 0; c < columns; ++c, group += step) {
        memcpy(group, weight + (k + c) * args.weight_stride + i, static_cast<size_t>(n) * sizeof(T));
        memset(group + n, 0, static_cast<size_t>(step - n) * sizeof(T));
      }
    }
  }
}

// Where the next rows are fetched: `pace` elements of each for every kRows steps along the width.
template <class T>
struct Ahead {
  const T* row[kRows];
  int64_t pace;
};

template <int C, class T>
LOCKIN_FAST_LOCAL void accumulate_tile(const Rows<T>& rows, int64_t offset, const T* packed, int64_t n,
                                       const Ahead<T>& ahead, Vec* state) {
  using Operand = DotOperand<T>;
  const T* row[kRows];
  for (int r = 0; r < kRows; ++r) row[r] = rows.row[r] + offset;
  Vec acc[kRows][C];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < C; ++c) acc[r][c] = zeros();
  }
  const auto multiply = [&](int64_t i) __attribute__((always_inline)) {
    Operand w[C];
    for (int c = 0; c < C; ++c) w[c] = Operand::read(packed + c * Operand::step);
    for (int r = 0; r < kRows; ++r) {
      const Operand x = Operand::read(row[r] + i);
      for (int c = 0; c < C; ++c) acc[r][c] = multiply_add(x, w[c], acc[r][c]);
    }
    packed += C * Operand::step;
  };
  int64_t i = 0;
  for (int64_t fetched = 0; i + kRows * Operand::step <= n; fetched += ahead.pace) {
    for (int r = 0; r < kRows; ++r, i += Operand::step) {
      __builtin_prefetch(ahead.row[r] + fetched, 0, 2);
      multiply(i);
    }
  }
  for (; i + Operand::step <= n; i += Operand::step) multiply(i);
  if (i < n) {
    for (int r = 0; r < kRows; ++r) {
      const Operand x = Operand::read_first(row[r] + i, n - i);
      for (int c = 0; c < C; ++c) acc[r][c] = multiply_add(x, Operand::read(packed + c * Operand::step), acc[r][c]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < C; ++c) state[r * C + c] = add(state[r * C + c], acc[r][c]);
  }
}

// sums[r] = the sum of the lanes of state[r * stride], in the same order for every row.
LOCKIN_FAST_LOCAL void sum_rows(const Vec* state, int stride, float* sums) {
#if LOCKIN_FAST_LEVEL >= 3
  store_sums(state[0], state[stride], state[2 * stride], state[3 * stride], sums);
#else
  for (int r = 0; r < kRows; ++r) sums[r] = sum(state[r * stride]);
#endif
}

template <class T>
LOCKIN_FAST_LOCAL void accumulate(int columns, const Rows<T>& rows, int64_t offset, const T* packed, int64_t n,
                                  const Ahead<T>& ahead, Vec* state) {
  packed += offset * columns;
  switch (columns) {
    case 1: return accumulate_tile<1>(rows, offset, packed, n, ahead, state);
    case 2: return accumulate_tile<2>(rows, offset, packed, n, ahead, state);
    case 3: return accumulate_tile<3>(rows, offset, packed, n, ahead, state);
#if LOCKIN_FAST_LEVEL >= 3
    case 4: return accumulate_tile<4>(rows, offset, packed, n, ahead, state);
#endif
    default: return accumulate_tile<kColumns>(rows, offset, packed, n, ahead, state);
  }
}

// Tiles of rows side by side; out[i][r] points at K floats for each valid row of tile i. Fetches the rows of `next`.
template <int Tiles, class T>
void tile_products(const EncodeArgs& args, const Rows<T>* rows, const Rows<T>* next, float* const* const* out,
                   int64_t chunk_bytes = kChunkBytes) {
  const int64_t chunk = chunk_bytes / static_cast<int64_t>(sizeof(T));
  const T* packed = static_cast<const T*>(args.packed);
  const int64_t all_groups = (args.latents + kColumns - 1) / kColumns;
  Vec state[kGroups][Tiles][kRows * kColumns];
  for (int64_t g0 = 0; g0 < all_groups; g0 += kGroups) {
    const int groups = static_cast<int>(all_groups - g0 < kGroups ? all_groups - g0 : kGroups);
    for (int g = 0; g < groups; ++g) {
      for (auto& tile : state[g]) {
        for (Vec& lane : tile) lane = zeros();
      }
    }
    for (int64_t offset = 0; offset < args.width; offset += chunk) {
      const int64_t n = args.width - offset < chunk ? args.width - offset : chunk;
      for (int g = 0; g < groups; ++g) {
        const int64_t k = (g0 + g) * kColumns;
        for (int i = 0; i < Tiles; ++i) {
          if (rows[i].count == 0) continue;
          Ahead<T> ahead;  // each group fetches its share of the columns
          const Rows<T>& fetched = next[i].count ? next[i] : rows[i];
          for (int r = 0; r < kRows; ++r) ahead.row[r] = fetched.row[r] + offset + (g0 + g) * n / all_groups;
          ahead.pace = kRows * DotOperand<T>::step / all_groups;
          accumulate(columns_from(k, args.latents), rows[i], offset, packed + k * padded_width(args.width), n, ahead,
                     state[g][i]);
        }
      }
    }
    for (int g = 0; g < groups; ++g) {
      const int64_t k = (g0 + g) * kColumns;
      const int columns = columns_from(k, args.latents);
      for (int i = 0; i < Tiles; ++i) {
        for (int c = 0; c < columns; ++c) {
          float sums[kRows];
          sum_rows(&state[g][i][c], columns, sums);
          for (int r = 0; r < rows[i].count; ++r) out[i][r][k + c] = sums[r];
        }
      }
    }
  }
}

template <class T>
void row_products(const EncodeArgs& args, const Rows<T>& rows, const Rows<T>& next, float* const* out,
                  int64_t chunk_bytes = kChunkBytes) {
  tile_products<1>(args, &rows, &next, &out, chunk_bytes);
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
