// The gradient of the narrow ops to the hidden state, on CUDA.
#pragma once

#include "../cpu/kernels.h"

namespace lockin_fast {

struct LatentBackwardParams {
  Dtype dtype;               // of grad, out and weight
  const void* grad;          // [T, d] or null; out itself to leave quiet tokens as they are
  int64_t grad_stride;
  void* out;                 // [T, d]
  int64_t out_stride;
  const float* coefficient;  // [T, K]
  const float* scale;        // [T]
  const void* weight;        // [K, d]
  int64_t weight_stride;
  int64_t tokens;
  int64_t latents;
  int64_t width;
};

// Null, or what went wrong with the launch.
const char* latent_backward(const LatentBackwardParams& params, void* stream);

}  // namespace lockin_fast
