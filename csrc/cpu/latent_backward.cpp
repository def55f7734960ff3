// out = grad + (scale * coefficient) W, a rank-K update of gradient rows.
//
// Each token adds only the latents with a nonzero factor, so its cost follows the sparsity exactly, and a token
// without any is copied (or left alone in place). Tokens go through in tiles that fit L2, a column panel of W that
// fits L1 at a time; the gradient rows of the next tile are fetched meanwhile.
#include "latent_backward.h"

#include "vec.h"

namespace lockin_fast {
namespace {

constexpr int64_t kPanel = kWidthPadding;
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
      count += (coefficient[k] != 0.0f) & (factor != 0.0f);  // a zero coefficient adds nothing, even under a NaN scale
    }
    tile->counts[i] = count;
  }
}

template <int Strip, class T>
LOCKIN_FAST_LOCAL void update_strip(const float* values, const int32_t* indices, int64_t count, const float* panel,
                                    const T* grad, T* out) {
  Vec acc[Strip];
  for (int i = 0; i < Strip; ++i) acc[i] = grad ? load(grad + i * Vec::width) : zeros();
  for (int64_t j = 0; j < count; ++j) {
    const Vec factor = splat(values[j]);
    const float* row = panel + indices[j] * kPanel;
    for (int i = 0; i < Strip; ++i) acc[i] = fma(factor, load(row + i * Vec::width), acc[i]);
  }
  for (int i = 0; i < Strip; ++i) store(out + i * Vec::width, acc[i]);
}

template <class T>
LOCKIN_FAST_LOCAL void update_rest(const float* values, const int32_t* indices, int64_t count, const float* panel,
                                   const T* grad, T* out, int64_t n) {
  Vec acc = grad ? load_first(grad, n) : zeros();
  for (int64_t j = 0; j < count; ++j) {
    acc = fma(splat(values[j]), load(panel + indices[j] * kPanel), acc);
  }
  store_first(out, acc, n);
}

template <class T>
LOCKIN_FAST_LOCAL void update_panel(const float* values, const int32_t* indices, int64_t count, const float* panel,
                                    int64_t n, const T* grad, T* out) {
  int64_t i = 0;
  for (; i + kStrip * Vec::width <= n; i += kStrip * Vec::width) {
    update_strip<kStrip>(values, indices, count, panel + i, grad ? grad + i : nullptr, out + i);
  }
  for (; i + Vec::width <= n; i += Vec::width) {
    update_strip<1>(values, indices, count, panel + i, grad ? grad + i : nullptr, out + i);
  }
  if (i < n) update_rest(values, indices, count, panel + i, grad ? grad + i : nullptr, out + i, n - i);
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
        update_panel(tile.values + i * args.latents, tile.indices + i * args.latents, tile.counts[i],
                     args.panels + column * args.latents, n, grad, out);
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

// Panel p holds columns [p * kPanel, (p + 1) * kPanel) of every latent row, one row after the other.
template <class T>
void widen_panels(const LatentBackwardArgs& args, int64_t first, int64_t last) {
  const T* weight = static_cast<const T*>(args.weight);
  for (int64_t p = first; p < last; ++p) {
    const int64_t column = p * kPanel;
    const int64_t n = args.width - column < kPanel ? args.width - column : kPanel;
    for (int64_t k = 0; k < args.latents; ++k) {
      const T* from = weight + k * args.weight_stride + column;
      float* to = args.panels + column * args.latents + k * kPanel;
      int64_t i = 0;
      for (; i + Vec::width <= n; i += Vec::width) store(to + i, load(from + i));
      if (i < n) store(to + i, load_first(from + i, n - i));
    }
  }
}

}  // namespace

namespace LOCKIN_FAST_UNIT {

int64_t pack_panel_units(const LatentBackwardArgs& args) { return (args.width + kPanel - 1) / kPanel; }

void pack_panels(const LatentBackwardArgs& args, int64_t first, int64_t last) {
  switch (args.dtype) {
    case Dtype::f32: return widen_panels<float>(args, first, last);
    case Dtype::f16: return widen_panels<f16>(args, first, last);
    case Dtype::bf16: return widen_panels<bf16>(args, first, last);
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
