// The one-sided penalty of each token and its coefficients, on CUDA.
#pragma once

#include "../common/half.h"
#include "nf4_rows.h"

namespace lockin_fast {

struct BlockPenaltyParams {
  Dtype dtype;             // of h, h_ref, weight and the outliers
  const void* h;           // [T, d]
  int64_t h_stride;
  const void* weight;      // [K, d]
  int64_t weight_stride;
  const float* bias;       // [K]
  const float* sign;       // [K]
  const float* threshold;  // [K] or null
  const float* margin;     // [K] or null
  const bool* mask;        // [T] or null
  const float* z_ref;      // [T, K], or
  const void* h_ref;       // [T, d], or
  int64_t h_ref_stride;
  Nf4Rows nf4;             // codes null where another reference is given
  int64_t tokens;
  int64_t latents;
  int64_t width;
  float unit;              // 1 for the sum over latents, 1/K for the mean
  float* per_token;            // [T]
  float* coefficient;          // [T, K]
  unsigned long long* active;  // zero before
};

// Null, or what went wrong with the launch.
const char* block_penalty(const BlockPenaltyParams& params, void* stream);

}  // namespace lockin_fast
