// out = grad + (scale * coefficient) W, a rank-K update of gradient rows.
//
// Each token adds only the latents with a nonzero factor, so its cost follows the sparsity exactly, and a token
// without any is copied (or left alone in place). Tokens go through in tiles that fit L2, a column panel of W that
// fits L1 at a time; the gradient rows of the next tile are fetched meanwhile.
#include "unit.h"
#include "vec.h"

namespace lockin_fast {
namespace {

constexpr int64_t kPanel = 256;
#if LOCKIN_FAST_LEVEL >= 3
constexpr int kStrip = 16;  // accumulators a token holds in registers
#else
constexpr int kStrip = 8;
#endif

struct Tile {
  float* values;     // [kTokenTile, K] nonzero factors
  int32_t* indices;  // [kTokenTile, K] their latents
  int64_t counts[kTokenTile];
  int64_t begin, tokens;
};

void gather_factors(const LatentBackwardArgs& args, int64_t begin, int64_t end, Tile* tile) {
  tile->begin = begin;
  tile->tokens = end - begin < kTokenTile ? end - begin : kTokenTile;
  for (int64_t i = 0; i < tile->tokens; ++i) {
    const float* coefficient = args.coefficient + (begin + i) * args.latents;
    const float scale = args.scale[begin + i];
    float* values = tile->values + i * args.latents;
    int32_t* indices = tile->indices + i * args.latents;
    int64_t count = 0;
    for (int64_t k = 0; k < args.latents; ++k) {
      const float factor = scale * coefficient[k];
      values[count] = factor;
      indices[count] = static_cast<int32_t>(k);
      count += factor != 0.0f;  // true for NaN
    }
    tile->counts[i] = count;
  }
}

template <int Strip, class T>
LOCKIN_FAST_LOCAL void update_strip(const float* values, const int32_t* indices, int64_t count, const float* weight,
                                    int64_t weight_stride, const T* grad, T* out) {
  Vec acc[Strip];
  for (int i = 0; i < Strip; ++i) acc[i] = grad ? load(grad + i * Vec::width) : zeros();
  for (int64_t j = 0; j < count; ++j) {
    const Vec factor = splat(values[j]);
    const float* row = weight + indices[j] * weight_stride;
    for (int i = 0; i < Strip; ++i) acc[i] = fma(factor, load(row + i * Vec::width), acc[i]);
  }
  for (int i = 0; i < Strip; ++i) store(out + i * Vec::width, acc[i]);
}

template <class T>
LOCKIN_FAST_LOCAL void update_rest(const float* values, const int32_t* indices, int64_t count, const float* weight,
                                   int64_t weight_stride, const T* grad, T* out, int64_t n) {
  Vec acc = grad ? load_first(grad, n) : zeros();
  for (int64_t j = 0; j < count; ++j) {
    acc = fma(splat(values[j]), load_first(weight + indices[j] * weight_stride, n), acc);
  }
  store_first(out, acc, n);
}

template <class T>
LOCKIN_FAST_LOCAL void update_panel(const LatentBackwardArgs& args, const float* values, const int32_t* indices,
                                    int64_t count, int64_t column, int64_t n, const T* grad, T* out) {
  const float* weight = args.weight + column;
  int64_t i = 0;
  for (; i + kStrip * Vec::width <= n; i += kStrip * Vec::width) {
    update_strip<kStrip>(values, indices, count, weight + i, args.width, grad ? grad + i : nullptr, out + i);
  }
  for (; i + Vec::width <= n; i += Vec::width) {
    update_strip<1>(values, indices, count, weight + i, args.width, grad ? grad + i : nullptr, out + i);
  }
  if (i < n) update_rest(values, indices, count, weight + i, args.width, grad ? grad + i : nullptr, out + i, n - i);
}

template <class T>
void update_tile(const LatentBackwardArgs& args, const Tile& tile, const Tile& next) {
  const T* grads = static_cast<const T*>(args.grad);
  T* outs = static_cast<T*>(args.out);
  for (int64_t column = 0; column < args.width; column += kPanel) {
    const int64_t n = args.width - column < kPanel ? args.width - column : kPanel;
    for (int64_t i = 0; i < tile.tokens; ++i) {
      if (grads && i < next.tokens && next.counts[i] > 0) {
        const T* ahead = grads + (next.begin + i) * args.grad_stride + column;
        for (int64_t p = 0; p < n; p += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(ahead + p, 1, 2);
      }
      const int64_t t = tile.begin + i;
      const T* grad = grads ? grads + t * args.grad_stride + column : nullptr;
      T* out = outs + t * args.out_stride + column;
      if (tile.counts[i] > 0) {
        update_panel(args, tile.values + i * args.latents, tile.indices + i * args.latents, tile.counts[i], column, n,
                     grad, out);
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
                   {values + kTokenTile * args.latents, indices + kTokenTile * args.latents, {}, 0, 0}};
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

template <class T>
void widen_row(const T* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + Vec::width <= n; i += Vec::width) store(to + i, load(from + i));
  if (i < n) store_first(to + i, load_first(from + i, n - i), n - i);
}

}  // namespace

namespace LOCKIN_FAST_UNIT {

void widen(Dtype dtype, const void* from, float* to, int64_t n) {
  switch (dtype) {
    case Dtype::f32: return widen_row(static_cast<const float*>(from), to, n);
    case Dtype::f16: return widen_row(static_cast<const f16*>(from), to, n);
    case Dtype::bf16: return widen_row(static_cast<const bf16*>(from), to, n);
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
