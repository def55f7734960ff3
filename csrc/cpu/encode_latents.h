// Latents of chosen rows; the packing is shared by every op that multiplies by a few latent rows.
#pragma once

#include "kernels.h"

namespace lockin_fast {

struct EncodeArgs {
  Dtype dtype;             // of h, h_ref and weight
  const void* h;           // [T, d]
  int64_t h_stride;
  const void* weight;      // [K, d]
  int64_t weight_stride;
  const float* bias;       // [K]
  const float* threshold;  // [K] or null
  int64_t latents;         // K
  int64_t width;           // d
  void* packed;            // [K, padded d] room for the packed weight, of dtype
  float* out;              // [T, K] latents; block_penalty writes its coefficients here
};

// First the packing, once a call: every token reads the weight again and again.
LOCKIN_FAST_DECLARE(int64_t, pack_units, const EncodeArgs&)
LOCKIN_FAST_DECLARE(void, pack, const EncodeArgs&, int64_t first, int64_t last)
LOCKIN_FAST_DECLARE(void, encode_latents, const EncodeArgs&, int64_t begin, int64_t end)

}  // namespace lockin_fast
