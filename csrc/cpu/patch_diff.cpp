// A few positions at a time: their differences in fp32 in a cache, then the products with all latent rows.
#include "patch_diff.h"

#include "dot.h"
#include "norm.h"

#include "../common/penalty.h"

namespace lockin_fast {
namespace {

template <class T>
LOCKIN_FAST_LOCAL void subtract(const T* a, const T* b, int64_t n, float* out) {
  const Vec minus = splat(-1.0f);
  int64_t i = 0;
  for (; i + Vec::width <= n; i += Vec::width) store(out + i, fma(minus, load(b + i), load(a + i)));
  if (i < n) store_first(out + i, fma(minus, load_first(b + i, n - i), load_first(a + i, n - i)), n - i);
}

LOCKIN_FAST_LOCAL void fill_nan(float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = __builtin_nanf("");
}

// Collects up to kRows positions of [*position, end) whose rows lie in h, and moves *position past them.
int next_positions(const PatchDiffArgs& args, int64_t* position, int64_t end, int64_t* positions) {
  const int64_t latents = args.encode.latents;
  int count = 0;
  for (; *position < end && count < kRows; ++*position) {
    const int64_t p = *position, row = args.rows[p];
    if (row >= 0 && row < args.tokens) {
      positions[count++] = p;
      continue;
    }
    fill_nan(args.norm + p, 1);
    fill_nan(args.projection + p * latents, latents);
    if (args.change) fill_nan(args.change + p * latents, latents);
  }
  return count;
}

// change[k] from the pre-activation of h and by how much the difference moves it.
LOCKIN_FAST_LOCAL void activate_change(const EncodeArgs& args, const float* moved, float* change) {
  for (int64_t k = 0; k < args.latents; ++k) {
    const float threshold = args.threshold ? args.threshold[k] : -__builtin_inff();
    const float pre = change[k] + args.bias[k];
    change[k] = activation(pre + moved[k], threshold) - activation(pre, threshold);
  }
}

template <class T>
void diff_positions(const PatchDiffArgs& args, int64_t begin, int64_t end, float* room) {
  const int64_t latents = args.encode.latents, width = args.encode.width, padded = padded_width(width);
  const Rows<float> no_rows{{}, 0};
  const Rows<T> none{{}, 0};
  for (int64_t position = begin; position < end;) {
    int64_t positions[kRows], rows[kRows];
    const int count = next_positions(args, &position, end, positions);
    if (count == 0) return;
    Rows<float> diff;
    diff.count = count;
    float *projection[kRows], *change[kRows];
    for (int r = 0; r < count; ++r) {
      const int64_t p = positions[r];
      rows[r] = args.rows[p];
      subtract(static_cast<const T*>(args.source) + p * args.source_stride,
               static_cast<const T*>(args.encode.h) + rows[r] * args.encode.h_stride, width, room + r * padded);
      args.norm[p] = static_cast<float>(norm(room + r * padded, width));
      projection[r] = args.projection + p * latents;
      change[r] = args.change ? args.change + p * latents : nullptr;
    }
    for (int r = 0; r < kRows; ++r) diff.row[r] = room + (r < count ? r : count - 1) * padded;
    row_products(args.wide, diff, no_rows, projection);
    if (!args.change) continue;
    row_products(args.encode, rows_of<T>(args.encode.h, args.encode.h_stride, rows, count), none, change);
    for (int r = 0; r < count; ++r) activate_change(args.encode, projection[r], change[r]);
  }
}

template <class T>
void widen(const EncodeArgs& args, int64_t first, int64_t last, float* wide) {
  for (int64_t k = first; k < last; ++k) {
    const T* from = static_cast<const T*>(args.weight) + k * args.weight_stride;
    float* to = wide + k * args.width;
    int64_t i = 0;
    for (; i + Vec::width <= args.width; i += Vec::width) store(to + i, load(from + i));
    if (i < args.width) store_first(to + i, load_first(from + i, args.width - i), args.width - i);
  }
}

}  // namespace

namespace LOCKIN_FAST_UNIT {

int64_t patch_diff_room(int64_t width) { return kRows * padded_width(width); }

void widen_rows(const EncodeArgs& args, int64_t first, int64_t last, float* wide) {
  switch (args.dtype) {
    case Dtype::f32: return widen<float>(args, first, last, wide);
    case Dtype::f16: return widen<f16>(args, first, last, wide);
    case Dtype::bf16: return widen<bf16>(args, first, last, wide);
  }
}

void patch_diff(const PatchDiffArgs& args, int64_t begin, int64_t end, float* room) {
  switch (args.encode.dtype) {
    case Dtype::f32: return diff_positions<float>(args, begin, end, room);
    case Dtype::f16: return diff_positions<f16>(args, begin, end, room);
    case Dtype::bf16: return diff_positions<bf16>(args, begin, end, room);
  }
}

}  // namespace LOCKIN_FAST_UNIT
}  // namespace lockin_fast
