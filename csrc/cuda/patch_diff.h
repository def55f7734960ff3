// What a patch would change: norms of differences between rows, and what latents see of them.
#pragma once

#include "../common/half.h"

namespace lockin_fast {

struct PatchDiffParams {
  Dtype dtype;             // of h, source and weight
  const void* h;           // [tokens, width]
  int64_t h_stride;        // in elements, as all strides here; the last dimension is contiguous
  const int64_t* rows;     // [count]; one outside h has NaN for its results
  const void* source;      // [count, width]
  int64_t source_stride;
  const void* weight;      // [latents, width]
  int64_t weight_stride;
  const float* bias;       // [latents] or null
  const float* threshold;  // [latents] or null
  int64_t tokens;
  int64_t count;
  int64_t width;
  int64_t latents;
  float* norm;             // [count]
  float* projection;       // [count, latents]
  float* change;           // [count, latents], where there is a bias
};

// Null, or why the launch failed.
const char* patch_diff(const PatchDiffParams& params, void* stream);

}  // namespace lockin_fast
