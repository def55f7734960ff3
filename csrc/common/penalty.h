// The block penalty of one latent on one token, for every kernel that computes it (CPU units, CUDA, and the Python tests).
//
// All functions have internal linkage: each translation unit keeps the copy it compiled with its own instruction set.
#pragma once

#ifdef __CUDACC__
#define LOCKIN_FAST_INLINE static __host__ __device__ __forceinline__
#else
#define LOCKIN_FAST_INLINE static inline __attribute__((always_inline))
#endif

namespace lockin_fast {

struct LatentPenalty {
  float value;        // e^2
  float coefficient;  // d e^2 / d pre
  bool active;        // e > 0
};

// The comparisons are written so that NaN takes the branch that keeps it.
LOCKIN_FAST_INLINE float relu(float x) { return x <= 0.0f ? 0.0f : x; }

// ReLU (threshold = -inf) or JumpReLU: relu(pre) where pre > threshold, else 0.
LOCKIN_FAST_INLINE float activation(float pre, float threshold) { return pre <= threshold ? 0.0f : relu(pre); }

// e = relu(sign * (z - z_ref) - margin) with z = activation(pre, threshold); the gradient passes only where z > 0.
LOCKIN_FAST_INLINE LatentPenalty latent_penalty(float pre, float z_ref, float sign, float margin, float threshold) {
  const float z = activation(pre, threshold);
  const float e = relu(sign * (z - z_ref) - margin);
  return {e * e, z == 0.0f ? 0.0f : 2.0f * sign * e, e > 0.0f};
}

}  // namespace lockin_fast
