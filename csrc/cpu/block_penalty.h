// The one-sided penalty of each token and its coefficients.
#pragma once

#include "encode_latents.h"

namespace lockin_fast {

struct BlockPenaltyArgs {
  EncodeArgs encode;
  const void* h_ref;       // [T, d] or null
  int64_t h_ref_stride;
  const float* z_ref;      // [T, K] or null
  const bool* mask;        // [T] or null
  const float* sign;       // [K]
  const float* margin;     // [K] or null
  float unit;              // 1 for the sum over latents, 1/K for the mean
  float* per_token;        // [T]
};

constexpr int64_t kPenaltyScratch = 6;

// Returns the number of active pairs; scratch holds kPenaltyScratch * K floats.
LOCKIN_FAST_DECLARE(int64_t, block_penalty, const BlockPenaltyArgs&, int64_t begin, int64_t end, float* scratch)

}  // namespace lockin_fast
