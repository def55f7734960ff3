// The one-sided penalty and its coefficients; h and h_ref go through the same products, a few tokens at a time, so that
// equal rows give exactly 0 and neither stream is read twice.
#include "block_penalty.h"

#include "dot.h"

#include "../common/penalty.h"

namespace lockin_fast {
namespace {

static_assert(kRows + 1 <= kPenaltyScratch, "reference rows and one row of squares");

// Turns the pre-activations in `row` into coefficients; returns the active pairs.
int64_t penalise(const BlockPenaltyArgs& args, float* row, const float* reference, bool reference_is_product,
                 float* squares, float* per_token) {
  const EncodeArgs& encode = args.encode;
  const int64_t latents = encode.latents;
  int32_t active = 0;
  for (int64_t k = 0; k < latents; ++k) {
    const float threshold = encode.threshold ? encode.threshold[k] : -__builtin_inff();
    const float margin = args.margin ? args.margin[k] : 0.0f;
    const float z_ref = reference_is_product ? activation(reference[k] + encode.bias[k], threshold) : reference[k];
    const LatentPenalty pair = latent_penalty(row[k] + encode.bias[k], z_ref, args.sign[k], margin, threshold);
    row[k] = pair.coefficient * args.unit;
    squares[k] = pair.value;
    active += pair.active;
  }
  float total = 0.0f;
  for (int64_t k = 0; k < latents; ++k) total += squares[k];
  *per_token = total * args.unit;
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

template <class T>
int64_t penalty(const BlockPenaltyArgs& args, int64_t begin, int64_t end, float* scratch) {
  const EncodeArgs& encode = args.encode;
  const int64_t latents = encode.latents;
  float* squares = scratch + kRows * latents;
  int64_t tokens[kRows], following[kRows];
  int64_t token = begin, active = 0;
  clear_masked(args, begin, end);
  int count = next_tokens(args.mask, &token, end, tokens);
  while (count > 0) {
    const int next_count = next_tokens(args.mask, &token, end, following);
    const Rows<T> rows = rows_of<T>(encode.h, encode.h_stride, tokens, count);
    const Rows<T> next = rows_of<T>(encode.h, encode.h_stride, following, next_count);
    float* out[kRows];
    const float* reference[kRows];
    for (int r = 0; r < count; ++r) out[r] = encode.out + tokens[r] * latents;
    if (args.h_ref) {
      float* products[kRows];
      for (int r = 0; r < count; ++r) reference[r] = products[r] = scratch + r * latents;
      const Rows<T> rows_ref = rows_of<T>(args.h_ref, args.h_ref_stride, tokens, count);
      row_products(encode, rows, rows_ref, out);
      row_products(encode, rows_ref, next, products);
    } else {
      for (int r = 0; r < count; ++r) reference[r] = args.z_ref + tokens[r] * latents;
      row_products(encode, rows, next, out);
    }
    for (int r = 0; r < count; ++r) {
      active += penalise(args, out[r], reference[r], args.h_ref != nullptr, squares, args.per_token + tokens[r]);
    }
    count = next_count;
    for (int r = 0; r < count; ++r) tokens[r] = following[r];
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
