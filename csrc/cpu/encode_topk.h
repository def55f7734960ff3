// The largest latents of every token out of a whole SAE.
#pragma once

#include "wide.h"

namespace lockin_fast {

// A latent's value (not negative, or NaN) and index as one number, greater for what comes first in the result: the bits
// of such floats are in the floats' own order with NaN above, and among equal values the lower index comes first.
constexpr uint64_t kLowWord = 0xffffffffu;

static inline int64_t key_index(uint64_t key) { return static_cast<int64_t>(kLowWord - (key & kLowWord)); }
static inline uint32_t key_bits(uint64_t key) { return static_cast<uint32_t>(key >> 32); }

struct EncodeTopkArgs {
  WideArgs wide;
  int64_t k;       // at least 1
  uint64_t* kept;  // [T, k] zeros; becomes the largest keys of each token, in the order of a heap
  float* floor;    // [T] room
};

// Latents [begin, end); packed has room for a lot of padded rows, of dtype.
LOCKIN_FAST_DECLARE(void, encode_topk, const EncodeTopkArgs&, int64_t begin, int64_t end, void* packed)

}  // namespace lockin_fast
