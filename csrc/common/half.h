// The dtypes that kernels take: bf16 and fp16 as storage types, and their scalar conversions (round to nearest even, NaN
// stays NaN).
#pragma once

#include <cstdint>
#include <cstring>

#include "penalty.h"

namespace lockin_fast {

enum class Dtype { f32, f16, bf16 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

LOCKIN_FAST_INLINE float float_from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

LOCKIN_FAST_INLINE uint32_t bits_from_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

LOCKIN_FAST_INLINE float to_float(float x) { return x; }

LOCKIN_FAST_INLINE float to_float(bf16 x) { return float_from_bits(static_cast<uint32_t>(x.bits) << 16); }

LOCKIN_FAST_INLINE float to_float(f16 x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Scaling by 2^112 moves the exponent bias from 15 to 127 and is exact for normal and subnormal halves alike.
  return float_from_bits(sign | bits_from_float(float_from_bits(rest << 13) * 0x1p112f));
#endif
}

LOCKIN_FAST_INLINE void from_float(float x, float* out) { *out = x; }

LOCKIN_FAST_INLINE void from_float(float x, bf16* out) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
#else
  const uint32_t bits = bits_from_float(x);
  if (x != x) {
    out->bits = static_cast<uint16_t>(bits >> 16 | 0x40u);
    return;
  }
  out->bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
#endif
}

LOCKIN_FAST_INLINE void from_float(float x, f16* out) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
#else
  const uint32_t bits = bits_from_float(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the rounded subnormal in the low bits
    half = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
#endif
}

}  // namespace lockin_fast
