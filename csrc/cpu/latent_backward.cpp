// out = grad + (scale * coefficient) W, a rank-K update of gradient rows.
//
// Each token adds only the latents with a nonzero factor, so its cost follows the sparsity exactly, and a token
// without any is copied (or left alone in place). Tokens go through in tiles that fit L2, a column panel of W that
// fits L1 at a time; the gradient rows of the next tile are fetched meanwhile.
#include "latent_backward.h"

#include "vec.h"

namespace lockin_fast {
namespace {

constexpr int64_t kPair = 2 * Vec::width;
constexpr int64_t kStrip = 4 * kPair;  // columns a token holds in registers
constexpr int64_t kPanelBytes = 24576;

// Whole strips, at least one and at most eight.
template <class T>
int64_t panel_columns(int64_t latents) {
  const int64_t strips = kPanelBytes / (kStrip * static_cast<int64_t>(sizeof(T)) * (latents > 0 ? latents : 1));
  return kStrip * (strips < 1 ? 1 : strips < 8 ? strips : 8);
}

// The width of panel rows of n columns: whole pairs of vectors.
constexpr int64_t pitch(int64_t n) { return (n + kPair - 1) / kPair * kPair; }

struct Tile {
  float* values;     // [kTokenTile, K] nonzero factors
  int32_t* indices;  // [kTokenTile, K] their latents
  int64_t counts[kTokenTile];
  int64_t begin, tokens;
};

// Writes the nonzero factors and their latents, from k on, and returns how many; a zero coefficient adds nothing, even
// under a NaN scale. A whole vector is written.
LOCKIN_FAST_LOCAL int64_t pick_factors(Vec coefficient, float scale, int32_t k, float* values, int32_t* indices) {
#if LOCKIN_FAST_LEVEL >= 3
  const __m512 factor = _mm512_mul_ps(coefficient.v, _mm512_set1_ps(scale));
  const __mmask16 kept = _mm512_cmp_ps_mask(coefficient.v, zeros().v, _CMP_NEQ_UQ) &
                         _mm512_cmp_ps_mask(factor, zeros().v, _CMP_NEQ_UQ);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  _mm512_storeu_ps(values, _mm512_maskz_compress_ps(kept, factor));
  _mm512_storeu_si512(indices, _mm512_maskz_compress_epi32(kept, _mm512_add_epi32(lanes, _mm512_set1_epi32(k))));
  return __builtin_popcount(kept);
#else
  float coefficients[Vec::width];
  store(coefficients, coefficient);
  int64_t count = 0;
  for (int i = 0; i < Vec::width; ++i) {
    const float factor = scale * coefficients[i];
    values[count] = factor;
    indices[count] = k + i;
    count += (coefficients[i] != 0.0f) & (factor != 0.0f);
  }
  return count;
#endif
}

void gather_factors(const LatentBackwardArgs& args, int64_t begin, int64_t end, Tile* tile) {
  tile->begin = begin;
  tile->tokens = end - begin < kTokenTile ? end - begin : kTokenTile;
  for (int64_t i = 0; i < tile->tokens; ++i) {
    const float* coefficient = args.coefficient + (begin + i) * args.latents;
    const float scale = args.scale[begin + i];
    float* values = tile->values + i * args.latents;
    int32_t* indices = tile->indices + i * args.latents;
    int64_t count = 0;
    for (int64_t k = 0; k < args.latents; k += Vec::width) {
      const int64_t left = args.latents - k;
      const Vec some = left < Vec::width ? load_first(coefficient + k, left) : load(coefficient + k);
      count += pick_factors(some, scale, static_cast<int32_t>(k), values + count, indices + count);
    }
    tile->counts[i] = count;
  }
}

// A few columns of a gradient row plus those of the chosen rows of the panel.
template <int Pairs, class T>
LOCKIN_FAST_LOCAL void update_columns(const float* values, const int32_t* indices, int64_t count, const T* panel,
                                      int64_t pitch, const T* grad, T* out) {
  Pair acc[Pairs];
  for (int i = 0; i < Pairs; ++i) acc[i] = grad ? load_pair(grad + i * kPair) : Pair{zeros(), zeros()};
  for (int64_t j = 0; j < count; ++j) {
    const Vec factor = splat(values[j]);
    const T* row = panel + indices[j] * pitch;
    for (int i = 0; i < Pairs; ++i) {
      const Pair w = load_pair(row + i * kPair);
      acc[i] = {fma(factor, w.first, acc[i].first), fma(factor, w.second, acc[i].second)};
    }
  }
  for (int i = 0; i < Pairs; ++i) store_pair(out + i * kPair, acc[i]);
}

// n columns of one token; `ahead` is fetched meanwhile, where it is not null.
template <class T>
LOCKIN_FAST_LOCAL void update_panel(const float* values, const int32_t* indices, int64_t count, const T* panel,
                                    int64_t n, const T* grad, T* out, const T* ahead) {
  int64_t i = 0;
  for (; i + kStrip <= n; i += kStrip) {
    for (int64_t p = 0; ahead && p < kStrip; p += 64 / static_cast<int64_t>(sizeof(T))) {
      __builtin_prefetch(ahead + i + p, 1, 2);
    }
    update_columns<4>(values, indices, count, panel + i, pitch(n), grad ? grad + i : nullptr, out + i);
  }
  for (; i + kPair <= n; i += kPair) {
    update_columns<1>(values, indices, count, panel + i, pitch(n), grad ? grad + i : nullptr, out + i);
  }
  if (i < n) {
    const size_t rest = static_cast<size_t>(n - i) * sizeof(T);
    T padded[kPair] = {};
    if (grad) memcpy(padded, grad + i, rest);
    update_columns<1>(values, indices, count, panel + i, pitch(n), padded, padded);
    memcpy(out + i, padded, rest);
  }
}

template <class T>
void update_tile(const LatentBackwardArgs& args, const Tile& tile, const Tile& next) {
  const T* grads = static_cast<const T*>(args.grad);
  T* outs = static_cast<T*>(args.out);
  const int64_t columns = panel_columns<T>(args.latents);
  for (int64_t column = 0; column < args.width; column += columns) {
    const int64_t n = args.width - column < columns ? args.width - column : columns;
    const T* panel = static_cast<const T*>(args.panels) + column * args.latents;
    for (int64_t i = 0; i < tile.tokens; ++i) {
      const bool fetches = grads && i < next.tokens && next.counts[i] > 0;
      const T* ahead = fetches ? grads + (next.begin + i) * args.grad_stride + column : nullptr;
      const int64_t t = tile.begin + i;
      const T* grad = grads ? grads + t * args.grad_stride + column : nullptr;
      T* out = outs + t * args.out_stride + column;
      if (tile.counts[i] > 0) {
        update_panel(tile.values + i * args.latents, tile.indices + i * args.latents, tile.counts[i], panel, n, grad,
                     out, ahead);
      } else if (!grad) {
        memset(out, 0, static_cast<size_t>(n) * sizeof(T));
      } else if (grad != out) {
        memcpy(out, grad, static_cast<size_t>(n) * sizeof(T));
      }
    }
  }
}

template <class T>
void update(const LatentBackwardArgs& args, int64_t begin, int64_t end, float* values, int32_t* indices) {
  Tile tiles[2] = {{values, indices, {}, 0, 0},
                   {values + factor_room(args.latents), indices + factor_room(args.latents), {}, 0, 0}};
  Tile* tile = &tiles[0];
  Tile* next = &tiles[1];
  gather_factors(args, begin, end, tile);
  while (tile->tokens > 0) {
    gather_factors(args, tile->begin + tile->tokens, end, next);
    update_tile<T>(args, *tile, *next);
    Tile* done = tile;
    tile = next;
    next = done;
  }
}

// Panel p holds its columns of every latent row, one row after the other, zeros past the width.
template <class T>
void fill_panels(const LatentBackwardArgs& args, int64_t first, int64_t last) {
  const T* weight = static_cast<const T*>(args.weight);
  const int64_t columns = panel_columns<T>(args.latents);
  for (int64_t column = first * columns; column < last * columns && column < args.width; column += columns) {
    const int64_t n = args.width - column < columns ? args.width - column : columns;
    T* to = static_cast<T*>(args.panels) + column * args.latents;
    for (int64_t k = 0; k < args.latents; ++k, to += pitch(n)) {
      memcpy(to, weight + k * args.weight_stride + column, static_cast<size_t>(n) * sizeof(T));
      memset(to + n, 0, static_cast<size_t>(pitch(n) - n) * sizeof(T));
    }
  }
}

template <class T>
int64_t panels_of(const LatentBackwardArgs& args) {
  const int64_t columns = panel_columns<T>(args.latents);
  return (args.width + columns - 1) / columns;
}

}  // namespace

namespace LOCKIN_FAST_UNIT {

int64_t pack_panel_units(const LatentBackwardArgs& args) {
  switch (args.dtype) {
    case Dtype::f32: return panels_of<float>(args);
    case Dtype::f16: return panels_of<f16>(args);
    case Dtype::bf16: return panels_of<bf16>(args);
  }
  return 0;
}

void pack_panels(const LatentBackwardArgs& args, int64_t first, int64_t last) {
  switch (args.dtype) {
    case Dtype::f32: return fill_panels<float>(args, first, last);
    case Dtype::f16: return fill_panels<f16>(args, first, last);
    case Dtype::bf16: return fill_panels<bf16>(args, first, last);
  }
}

void latent_backward(const LatentBackwardArgs& args, int64_t begin, int64_t end, float* values, int32_t* indices) {
  switch (args.dtype) {
    case Dtype::f32: return update<float>(args, begin, end, values, indices);
    case Dtype::f16: return update<f16>(args, begin, end, values, indices);
    case Dtype::bf16: return update<bf16>(args, begin, end, values, indices);
  }
}

}  // namespace LOCKIN_FAST_UNIT
}  // namespace lockin_fast
