// Exponential and logarithm on Vec, for softmax and entropies.
//
// Written with the compiler's vector operators, so that every instruction set runs the same arithmetic but for fused
// multiply-adds. The polynomials are minimax fits, their errors far below the rounding of float32.
#pragma once

#include "vec.h"

namespace lockin_fast {
namespace {

using Floats = decltype(Vec::v);
typedef uint32_t Words __attribute__((vector_size(sizeof(Floats))));
typedef int32_t Ints __attribute__((vector_size(sizeof(Floats))));

LOCKIN_FAST_LOCAL Words bits_of(Vec a) { return reinterpret_cast<Words>(a.v); }
LOCKIN_FAST_LOCAL Vec from_bits(Words bits) { return {reinterpret_cast<Floats>(bits)}; }

// e^x for x <= 0: relative error below 2e-7, exactly 1 at 0, exactly 0 below -87.7 and at -inf; NaN stays NaN.
LOCKIN_FAST_LOCAL Vec exp_nonpositive(Vec x) {
  x = maximum(splat(-88.0f), x);
  // Adding 1.5 * 2^23 rounds to the nearest integer n and leaves it in the low bits.
  const Vec magic = splat(0x1.8p23f);
  const Vec shifted = fma(x, splat(0x1.715476p0f), magic);  // log2(e)
  const Vec n = sub(shifted, magic);
  // r = x - n ln 2, with ln 2 in two parts of which n times the first is exact.
  const Vec r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
  // e^r on |r| <= ln 2 / 2 within 8e-9.
  Vec p = fma(r, splat(1.394112413e-3f), splat(8.363181235e-3f));
  p = fma(p, r, splat(4.166637513e-2f));
  p = fma(p, r, splat(1.666657697e-1f));
  p = fma(p, r, splat(5.0e-1f));
  p = add(fma(mul(p, r), r, r), splat(1.0f));
  const Words scale = (bits_of(shifted) + 127) << 23;  // 2^n; n = -127 gives 0
  return mul(p, from_bits(scale));
}

// r ln r - r + 1 for r >= 0, the excess of r ln r over its tangent at 1: never negative, and accurate relative to
// itself next to 1 too, where it is (r - 1)^2 / 2. 1 at 0 and below 2^-126; relative error below 1e-6 of max(itself,
// what the rounding of r costs). NaN stays NaN.
LOCKIN_FAST_LOCAL Vec tangent_excess(Vec r) {
  // r = 2^e f with f in [2/3, 4/3).
  const Words field = (bits_of(r) - 0x3f2aaaabu) & 0xff800000u;
  const Vec f = from_bits(bits_of(r) - field);
  const Vec power = from_bits(field + 0x3f800000u);  // 2^e
  const Vec e_ln2 = mul({__builtin_convertvector(reinterpret_cast<Ints>(field), Floats)}, splat(0x1.62e43p-24f));
  // f ln f - f + 1 = u^2 P(u) with u = f - 1, within 4e-8.
  const Vec u = sub(f, splat(1.0f));
  Vec p = fma(u, splat(-1.652927452e-2f), splat(2.061928495e-2f));
  p = fma(p, u, splat(-2.357356134e-2f));
  p = fma(p, u, splat(3.313428706e-2f));
  p = fma(p, u, splat(-5.000772598e-2f));
  p = fma(p, u, splat(8.333784216e-2f));
  p = fma(p, u, splat(-1.666665978e-1f));
  p = fma(p, u, splat(4.999999841e-1f));
  // r ln r - r + 1 = 2^e (f ln f - f + 1) + r e ln 2 + 1 - 2^e
  return fma(mul(mul(u, u), p), power, fma(e_ln2, r, sub(splat(1.0f), power)));
}

}  // namespace
}  // namespace lockin_fast
