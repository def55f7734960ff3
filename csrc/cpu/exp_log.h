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

// Several vectors that go through the same steps side by side: a processor looks ahead too little to find the parallel
// work in one long chain after the other.
template <int B>
struct Vecs {
  Vec v[B];
};

// step(b) for each of them.
template <int B, class Step>
LOCKIN_FAST_LOCAL Vecs<B> each(const Step& step) {
  Vecs<B> out;
  for (int b = 0; b < B; ++b) out.v[b] = step(b);
  return out;
}

// A polynomial by Horner's rule, the highest coefficient first.
template <int B, int N>
LOCKIN_FAST_LOCAL Vecs<B> polynomial(const Vecs<B>& x, const float (&c)[N]) {
  Vecs<B> p = each<B>([&](int b) { return fma(x.v[b], splat(c[0]), splat(c[1])); });
  for (int i = 2; i < N; ++i) p = each<B>([&](int b) { return fma(p.v[b], x.v[b], splat(c[i])); });
  return p;
}

// e^x for x <= 0: relative error below 2e-7, exactly 1 at 0, exactly 0 below -87.7 and at -inf; NaN stays NaN.
template <int B>
LOCKIN_FAST_LOCAL Vecs<B> exp_nonpositive(Vecs<B> x) {
  x = each<B>([&](int b) { return maximum(splat(-88.0f), x.v[b]); });
  // Adding 1.5 * 2^23 rounds x log2(e) to the nearest integer n and leaves it in the low bits.
  const Vec magic = splat(0x1.8p23f);
  const Vecs<B> shifted = each<B>([&](int b) { return fma(x.v[b], splat(0x1.715476p0f), magic); });
  const Vecs<B> n = each<B>([&](int b) { return sub(shifted.v[b], magic); });
  // r = x - n ln 2, with ln 2 in two parts of which n times the first is exact.
  Vecs<B> r = each<B>([&](int b) { return fma(n.v[b], splat(-0.693359375f), x.v[b]); });
  r = each<B>([&](int b) { return fma(n.v[b], splat(2.12194440e-4f), r.v[b]); });
  // e^r = 1 + r + r^2 P(r) on |r| <= ln 2 / 2, within 8e-9.
  Vecs<B> p = polynomial(r, {1.394112413e-3f, 8.363181235e-3f, 4.166637513e-2f, 1.666657697e-1f, 5.0e-1f});
  p = each<B>([&](int b) { return mul(p.v[b], r.v[b]); });
  p = each<B>([&](int b) { return fma(p.v[b], r.v[b], r.v[b]); });
  p = each<B>([&](int b) { return add(p.v[b], splat(1.0f)); });
  // Times 2^n; n = -127 gives 0.
  return each<B>([&](int b) { return mul(p.v[b], from_bits((bits_of(shifted.v[b]) + 127) << 23)); });
}

LOCKIN_FAST_LOCAL Vec exp_nonpositive(Vec x) { return exp_nonpositive(Vecs<1>{{x}}).v[0]; }

// r ln r - r + 1 for r >= 0, the excess of r ln r over its tangent at 1: never negative, and accurate relative to
// itself next to 1 too, where it is (r - 1)^2 / 2. 1 at 0 and below 2^-126; NaN stays NaN.
template <int B>
LOCKIN_FAST_LOCAL Vecs<B> tangent_excess(const Vecs<B>& r) {
  // r = 2^e f with f in [2/3, 4/3); the field holds e where a float has its exponent.
  Words field[B];
  for (int b = 0; b < B; ++b) field[b] = (bits_of(r.v[b]) - 0x3f2aaaabu) & 0xff800000u;
  const Vecs<B> u = each<B>([&](int b) { return sub(from_bits(bits_of(r.v[b]) - field[b]), splat(1.0f)); });
  const Vecs<B> power = each<B>([&](int b) { return from_bits(field[b] + 0x3f800000u); });  // 2^e
  const Vecs<B> e_ln2 = each<B>([&](int b) {
    return mul({__builtin_convertvector(reinterpret_cast<Ints>(field[b]), Floats)}, splat(0x1.62e43p-24f));
  });
  // f ln f - f + 1 = u^2 P(u) with u = f - 1, within 4e-8.
  Vecs<B> p = polynomial(u, {-1.652927452e-2f, 2.061928495e-2f, -2.357356134e-2f, 3.313428706e-2f, -5.000772598e-2f,
                             8.333784216e-2f, -1.666665978e-1f, 4.999999841e-1f});
  const Vecs<B> squares = each<B>([&](int b) { return mul(u.v[b], u.v[b]); });
  p = each<B>([&](int b) { return mul(p.v[b], squares.v[b]); });
  // r ln r - r + 1 = 2^e (f ln f - f + 1) + r e ln 2 + 1 - 2^e
  const Vecs<B> rest = each<B>([&](int b) { return fma(e_ln2.v[b], r.v[b], sub(splat(1.0f), power.v[b])); });
  return each<B>([&](int b) { return fma(p.v[b], power.v[b], rest.v[b]); });
}

}  // namespace
}  // namespace lockin_fast
