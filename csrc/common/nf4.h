// NF4 of one element: the codebook, the nearest code and the scale of a block, for every kernel that computes them (CPU
// units, CUDA, and the Python tests). The codes and scales are those of bitsandbytes, bit for bit.
#pragma once

#include <cstdint>

#include "half.h"

namespace lockin_fast {

// The quantiles of a normal distribution, scaled to [-1, 1] with an exact zero: Dettmers et al., arXiv 2305.14314.
#define LOCKIN_FAST_NF4_CODEBOOK                                                                             \
  -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,           \
      -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,        \
      0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,                 \
      0.7229568362236023f, 1.0f

constexpr int kNf4Codes = 16;

// Smallest block scale that is inverted; below it a block's values shrink towards the code of zero.
constexpr float kNf4Tiny = 1e-38f;

LOCKIN_FAST_INLINE constexpr float nf4_value(uint32_t code) {
  constexpr float values[kNf4Codes] = {LOCKIN_FAST_NF4_CODEBOOK};
  return values[code & 15u];
}

// Where code i ends and code i + 1 begins, i in [0, 15): halfway, rounded to fp32; the boundary itself belongs to i.
LOCKIN_FAST_INLINE constexpr float nf4_boundary(uint32_t i) { return (nf4_value(i) + nf4_value(i + 1)) * 0.5f; }

// What the elements of a block are multiplied by. NaN stays NaN; an infinite block scales to 0.
LOCKIN_FAST_INLINE float nf4_inverse(float absmax) { return 1.0f / (absmax < kNf4Tiny ? kNf4Tiny : absmax); }

// The code of x = element * nf4_inverse(absmax): four steps of a binary search over the boundaries. NaN gives 15.
LOCKIN_FAST_INLINE uint32_t nf4_code(float x) {
  const bool eight = !(x <= nf4_boundary(7));
  const bool four = !(x <= (eight ? nf4_boundary(11) : nf4_boundary(3)));
  const float two_low = four ? nf4_boundary(5) : nf4_boundary(1);
  const float two_high = four ? nf4_boundary(13) : nf4_boundary(9);
  const bool two = !(x <= (eight ? two_high : two_low));
  const float one_low = four ? (two ? nf4_boundary(6) : nf4_boundary(4)) : (two ? nf4_boundary(2) : nf4_boundary(0));
  const float one_high = four ? (two ? nf4_boundary(14) : nf4_boundary(12)) : (two ? nf4_boundary(10) : nf4_boundary(8));
  const bool one = !(x <= (eight ? one_high : one_low));
  return eight * 8u + four * 4u + two * 2u + one;
}

// Two codes a byte, the even element in the high nibble.
LOCKIN_FAST_INLINE uint8_t nf4_pack(uint32_t even, uint32_t odd) { return static_cast<uint8_t>(even << 4 | odd); }

// fp32 bits of |x| compare as integers like |x|, with NaN above everything: a maximum over them keeps NaN.
LOCKIN_FAST_INLINE uint32_t magnitude_bits(float x) { return bits_from_float(x) & 0x7fffffffu; }

}  // namespace lockin_fast
