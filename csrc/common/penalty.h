// The block penalty of one latent on one token, for every kernel that computes it (CPU units, CUDA, and the Python tests).
// V is float, or a vector of latents, for which the CPU units have the same few operations.
//
// All functions have internal linkage: each translation unit keeps the copy it compiled with its own instruction set.
#pragma once

#ifdef __CUDACC__
#define LOCKIN_FAST_INLINE static __host__ __device__ __forceinline__
#else
#define LOCKIN_FAST_INLINE static inline __attribute__((always_inline))
#endif

namespace lockin_fast {

// x where a > b or either is NaN, else 0: NaN is never taken for zero.
LOCKIN_FAST_INLINE float zero_where_le(float x, float a, float b) { return a <= b ? 0.0f : x; }
LOCKIN_FAST_INLINE bool positive(float x) { return x > 0.0f; }

template <class V>
struct LatentPenaltyOf {
  V value;                         // e^2
  V coefficient;                   // d e^2 / d pre
  decltype(positive(V{})) active;  // e > 0; of a vector, in how many lanes
};
using LatentPenalty = LatentPenaltyOf<float>;

template <class V>
LOCKIN_FAST_INLINE V relu(V x) {
  return zero_where_le(x, x, V{});
}

// ReLU (threshold = -inf) or JumpReLU: relu(pre) where pre > threshold, else 0.
template <class V>
LOCKIN_FAST_INLINE V activation(V pre, V threshold) {
  return zero_where_le(relu(pre), pre, threshold);
}

// e = relu(sign * (z - z_ref) - margin) with z = activation(pre, threshold); the gradient passes only where z > 0.
template <class V>
LOCKIN_FAST_INLINE LatentPenaltyOf<V> latent_penalty(V pre, V z_ref, V sign, V margin, V threshold) {
  const V z = activation(pre, threshold);
  const V e = relu(sign * (z - z_ref) - margin);
  return {e * e, zero_where_le((sign + sign) * e, z, V{}), positive(e)};
}

}  // namespace lockin_fast
