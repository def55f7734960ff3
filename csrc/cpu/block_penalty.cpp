// The one-sided penalty and its coefficients; h and h_ref go through the same products, a few tokens at a time, so that
// equal rows give exactly 0 and neither stream is read twice.
#include "block_penalty.h"

#include <utility>

#include "dot.h"

#include "../common/penalty.h"

namespace lockin_fast {
namespace {

static_assert(kRows + 2 <= kPenaltyScratch, "reference rows, thresholds and margins");

struct PerLatent {
  const float *bias, *threshold, *sign, *margin;
  int64_t latents;
  float unit;
};

// `room` takes two rows, of what stands for thresholds and margins that are not given.
PerLatent per_latent(const BlockPenaltyArgs& args, float* room) {
  const EncodeArgs& encode = args.encode;
  const int64_t latents = encode.latents;
  for (int64_t k = 0; k < latents; ++k) {
    room[k] = encode.threshold ? encode.threshold[k] : -__builtin_inff();
    room[latents + k] = args.margin ? args.margin[k] : 0.0f;
  }
  return {encode.bias, room, args.sign, room + latents, latents, args.unit};
}

// A vector of latents from k on; the rest of it is zero past the last one, which is never active.
struct Lanes {
  int64_t k, latents;
  LOCKIN_FAST_LOCAL bool whole() const { return k + Vec::width <= latents; }
  LOCKIN_FAST_LOCAL Vec read(const float* p) const { return whole() ? load(p + k) : load_first(p + k, latents - k); }
  LOCKIN_FAST_LOCAL void write(float* p, Vec a) const {
    if (whole()) return store(p + k, a);
    store_first(p + k, a, latents - k);
  }
};

// Turns the pre-activations in `row` into coefficients; returns the active pairs.
template <bool ReferenceIsProduct>
LOCKIN_FAST_LOCAL int64_t penalise(const PerLatent& per, float* row, const float* reference, float* per_token) {
  int64_t active = 0;
  Vec total = zeros();
  for (Lanes at{0, per.latents}; at.k < per.latents; at.k += Vec::width) {
    const Vec bias = at.read(per.bias), threshold = at.read(per.threshold);
    const Vec given = at.read(reference);
    const Vec z_ref = ReferenceIsProduct ? activation(given + bias, threshold) : given;
    const auto pair = latent_penalty(at.read(row) + bias, z_ref, at.read(per.sign), at.read(per.margin), threshold);
    at.write(row, pair.coefficient * splat(per.unit));
    total = total + pair.value;
    active += pair.active;
  }
  *per_token = sum(total) * per.unit;
  return active;
}

void clear_masked(const BlockPenaltyArgs& args, int64_t begin, int64_t end) {
  const int64_t latents = args.encode.latents;
  for (int64_t t = begin; args.mask && t < end; ++t) {
    if (args.mask[t]) continue;
    args.per_token[t] = 0.0f;
    memset(args.encode.out + t * latents, 0, static_cast<size_t>(latents) * sizeof(float));
  }
}

// What goes through the products together: tokens with their references, or, without h_ref, twice as many tokens.
template <class T>
struct Tile {
  int64_t tokens[2 * kRows];
  int count;
  Rows<T> rows[2];
};

template <class T>
void next_tile(const BlockPenaltyArgs& args, int64_t* token, int64_t end, Tile<T>* tile) {
  const EncodeArgs& encode = args.encode;
  const int first = next_tokens(args.mask, token, end, tile->tokens);
  const int second = args.h_ref ? 0 : next_tokens(args.mask, token, end, tile->tokens + first);
  tile->count = first + second;
  tile->rows[0] = rows_of<T>(encode.h, encode.h_stride, tile->tokens, first);
  tile->rows[1] = args.h_ref ? rows_of<T>(args.h_ref, args.h_ref_stride, tile->tokens, first)
                             : rows_of<T>(encode.h, encode.h_stride, tile->tokens + first, second);
}

template <class T>
int64_t penalty(const BlockPenaltyArgs& args, int64_t begin, int64_t end, float* scratch) {
  const EncodeArgs& encode = args.encode;
  const int64_t latents = encode.latents;
  const PerLatent per = per_latent(args, scratch + kRows * latents);
  float* out[2 * kRows];  // of the second rows, with h_ref, the products of that
  float* const* const outs[2] = {out, out + kRows};
  for (int r = 0; r < kRows; ++r) out[kRows + r] = scratch + r * latents;
  clear_masked(args, begin, end);
  Tile<T> tiles[2];
  Tile<T>*tile = &tiles[0], *next = &tiles[1];
  int64_t token = begin, active = 0;
  for (next_tile(args, &token, end, tile); tile->count > 0; std::swap(tile, next)) {
    next_tile(args, &token, end, next);
    for (int r = 0; r < tile->count; ++r) out[r] = encode.out + tile->tokens[r] * latents;
    tile_products<2>(encode, tile->rows, next->rows, outs);
    for (int r = 0; r < tile->count; ++r) {
      const int64_t t = tile->tokens[r];
      active += args.h_ref ? penalise<true>(per, out[r], out[kRows + r], args.per_token + t)
                           : penalise<false>(per, out[r], args.z_ref + t * latents, args.per_token + t);
    }
  }
  return active;
}

}  // namespace

namespace LOCKIN_FAST_UNIT {

int64_t block_penalty(const BlockPenaltyArgs& args, int64_t begin, int64_t end, float* scratch) {
  switch (args.encode.dtype) {
    case Dtype::f32: return penalty<float>(args, begin, end, scratch);
    case Dtype::f16: return penalty<f16>(args, begin, end, scratch);
    case Dtype::bf16: return penalty<bf16>(args, begin, end, scratch);
  }
  return 0;
}

}  // namespace LOCKIN_FAST_UNIT
}  // namespace lockin_fast
