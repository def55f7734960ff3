// One float vector type per instruction set, with loads and stores that convert from and to bf16 and fp16.
//
// Included by kernel sources only; everything sits in an anonymous namespace so that no unit can lend another its code.
// LOCKIN_FAST_LEVEL is 0 baseline, 2 AVX2+FMA+F16C, 3 AVX-512, 4 AVX-512 with BF16.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/half.h"

#if LOCKIN_FAST_LEVEL >= 2
#include <immintrin.h>
#endif

namespace lockin_fast {
namespace {

#define LOCKIN_FAST_LOCAL inline __attribute__((always_inline))

#if LOCKIN_FAST_LEVEL >= 3

struct Vec {
  static constexpr int width = 16;
  __m512 v;
};

LOCKIN_FAST_LOCAL Vec zeros() { return {_mm512_setzero_ps()}; }
LOCKIN_FAST_LOCAL Vec splat(float x) { return {_mm512_set1_ps(x)}; }
LOCKIN_FAST_LOCAL Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
LOCKIN_FAST_LOCAL Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
LOCKIN_FAST_LOCAL Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
LOCKIN_FAST_LOCAL Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
// The larger; b where either is NaN.
LOCKIN_FAST_LOCAL Vec maximum(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
LOCKIN_FAST_LOCAL Vec zero_where_le(Vec x, Vec a, Vec b) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ), x.v)};
}
LOCKIN_FAST_LOCAL int positive(Vec a) {
  return __builtin_popcount(_mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_GT_OQ));
}
LOCKIN_FAST_LOCAL float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
// The four lane sums at once, by adding while transposing: a third of the shuffles of four separate sums.
LOCKIN_FAST_LOCAL void store_sums(Vec a, Vec b, Vec c, Vec d, float* sums) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  const __m512 low = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
  const __m512 high = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
  const __m512 all = _mm512_add_ps(low, high);
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
LOCKIN_FAST_LOCAL Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
LOCKIN_FAST_LOCAL Vec load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
LOCKIN_FAST_LOCAL Vec load(const bf16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
LOCKIN_FAST_LOCAL void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
LOCKIN_FAST_LOCAL void store(f16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
#if LOCKIN_FAST_LEVEL == 4
// Like vdpbf16ps below, the instruction takes numbers under 2^-126 for zero.
LOCKIN_FAST_LOCAL void store(bf16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
}
#else
// The bits of a whose upper halves are a rounded to bf16.
LOCKIN_FAST_LOCAL __m512i rounded(Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(sum, nan, bits, _mm512_set1_epi32(0x400000));
}
LOCKIN_FAST_LOCAL void store(bf16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(a), 16)));
}
#endif

#elif LOCKIN_FAST_LEVEL == 2

struct Vec {
  static constexpr int width = 8;
  __m256 v;
};

LOCKIN_FAST_LOCAL Vec zeros() { return {_mm256_setzero_ps()}; }
LOCKIN_FAST_LOCAL Vec splat(float x) { return {_mm256_set1_ps(x)}; }
LOCKIN_FAST_LOCAL Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
LOCKIN_FAST_LOCAL Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
LOCKIN_FAST_LOCAL Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
LOCKIN_FAST_LOCAL Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
// The larger; b where either is NaN.
LOCKIN_FAST_LOCAL Vec maximum(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
LOCKIN_FAST_LOCAL Vec zero_where_le(Vec x, Vec a, Vec b) {
  return {_mm256_and_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NLE_UQ), x.v)};
}
LOCKIN_FAST_LOCAL int positive(Vec a) {
  return __builtin_popcount(_mm256_movemask_ps(_mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_GT_OQ)));
}
LOCKIN_FAST_LOCAL float sum(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
LOCKIN_FAST_LOCAL Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
LOCKIN_FAST_LOCAL Vec load(const f16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
LOCKIN_FAST_LOCAL Vec load(const bf16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
LOCKIN_FAST_LOCAL void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
LOCKIN_FAST_LOCAL void store(f16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
// The bits of a whose upper halves are a rounded to bf16.
LOCKIN_FAST_LOCAL __m256i rounded(Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(sum, quiet, nan);
}
LOCKIN_FAST_LOCAL void store(bf16* p, Vec a) {
  const __m256i kept = _mm256_srli_epi32(rounded(a), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(kept, kept), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

#else

struct Vec {
  static constexpr int width = 4;
  typedef float Native __attribute__((vector_size(16)));
  Native v;
};

LOCKIN_FAST_LOCAL Vec zeros() { return {Vec::Native{0.0f, 0.0f, 0.0f, 0.0f}}; }
LOCKIN_FAST_LOCAL Vec splat(float x) { return {Vec::Native{x, x, x, x}}; }
LOCKIN_FAST_LOCAL Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
LOCKIN_FAST_LOCAL Vec add(Vec a, Vec b) { return {a.v + b.v}; }
LOCKIN_FAST_LOCAL Vec sub(Vec a, Vec b) { return {a.v - b.v}; }
LOCKIN_FAST_LOCAL Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
// The larger; b where either is NaN.
LOCKIN_FAST_LOCAL Vec maximum(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
LOCKIN_FAST_LOCAL Vec zero_where_le(Vec x, Vec a, Vec b) {
  typedef int32_t Words __attribute__((vector_size(16)));
  return {reinterpret_cast<Vec::Native>(reinterpret_cast<Words>(x.v) & ~reinterpret_cast<Words>(a.v <= b.v))};
}
LOCKIN_FAST_LOCAL int positive(Vec a) {
  const auto above = a.v > zeros().v;  // -1 where true
  return -(above[0] + above[1] + above[2] + above[3]);
}
LOCKIN_FAST_LOCAL float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
template <class T>
LOCKIN_FAST_LOCAL Vec load(const T* p) {
  return {Vec::Native{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
LOCKIN_FAST_LOCAL Vec load(const bf16* p) {
  typedef uint16_t Halves __attribute__((vector_size(8)));
  typedef uint32_t Words __attribute__((vector_size(16)));
  Halves halves;
  memcpy(&halves, p, sizeof(halves));
  const Words words = __builtin_convertvector(halves, Words) << 16;
  return {reinterpret_cast<Vec::Native>(words)};
}
template <class T>
LOCKIN_FAST_LOCAL void store(T* p, Vec a) {
  for (int i = 0; i < Vec::width; ++i) from_float(a.v[i], p + i);
}

#endif

LOCKIN_FAST_LOCAL Vec operator+(Vec a, Vec b) { return add(a, b); }
LOCKIN_FAST_LOCAL Vec operator-(Vec a, Vec b) { return sub(a, b); }
LOCKIN_FAST_LOCAL Vec operator*(Vec a, Vec b) { return mul(a, b); }

// The first n < width elements; the rest reads as zero.
template <class T>
LOCKIN_FAST_LOCAL Vec load_first(const T* p, int64_t n) {
  T padded[Vec::width] = {};
  memcpy(padded, p, static_cast<size_t>(n) * sizeof(T));
  return load(padded);
}

template <class T>
LOCKIN_FAST_LOCAL void store_first(T* p, Vec a, int64_t n) {
  T padded[Vec::width];
  store(padded, a);
  memcpy(p, padded, static_cast<size_t>(n) * sizeof(T));
}

// 2 * width neighbouring elements in an order of its own: of bf16 the even ones and the odd ones, as they share words.
struct Pair {
  Vec first, second;
};

template <class T>
LOCKIN_FAST_LOCAL Pair load_pair(const T* p) {
  return {load(p), load(p + Vec::width)};
}

template <class T>
LOCKIN_FAST_LOCAL void store_pair(T* p, Pair a) {
  store(p, a.first);
  store(p + Vec::width, a.second);
}

#if LOCKIN_FAST_LEVEL >= 3
LOCKIN_FAST_LOCAL Pair load_pair(const bf16* p) {
  const __m512i words = _mm512_loadu_si512(p), odd = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))}, {_mm512_castsi512_ps(_mm512_and_si512(words, odd))}};
}
LOCKIN_FAST_LOCAL void store_pair(bf16* p, Pair a) {
#if LOCKIN_FAST_LEVEL == 4
  const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(a.second.v, a.first.v));
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i order = _mm512_or_si512(low, _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(16)), 16));
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, halves));
#else
  const __m512i even = _mm512_srli_epi32(rounded(a.first), 16), odd = rounded(a.second);
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, even, odd));
#endif
}
#elif LOCKIN_FAST_LEVEL == 2
LOCKIN_FAST_LOCAL Pair load_pair(const bf16* p) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i odd = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(words, 16))}, {_mm256_castsi256_ps(_mm256_and_si256(words, odd))}};
}
LOCKIN_FAST_LOCAL void store_pair(bf16* p, Pair a) {
  const __m256i even = _mm256_srli_epi32(rounded(a.first), 16), odd = rounded(a.second);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(even, odd, 0xaa));
}
#endif

// What one multiply-accumulate of a dot product consumes: `step` elements of each operand.
template <class T>
struct DotOperand {
  static constexpr int step = Vec::width;
  Vec v;
  static LOCKIN_FAST_LOCAL DotOperand read(const T* p) { return {load(p)}; }
  static LOCKIN_FAST_LOCAL DotOperand read_first(const T* p, int64_t n) { return {load_first(p, n)}; }
};

template <class T>
LOCKIN_FAST_LOCAL Vec multiply_add(DotOperand<T> a, DotOperand<T> b, Vec c) {
  return fma(a.v, b.v, c);
}

#if LOCKIN_FAST_LEVEL == 4
// vdpbf16ps multiplies 32 bf16 pairs and accumulates neighbours into 16 fp32 lanes.
template <>
struct DotOperand<bf16> {
  static constexpr int step = 32;
  __m512bh v;
  static LOCKIN_FAST_LOCAL DotOperand read(const bf16* p) { return {reinterpret_cast<__m512bh>(_mm512_loadu_si512(p))}; }
  static LOCKIN_FAST_LOCAL DotOperand read_first(const bf16* p, int64_t n) {
    const __mmask32 mask = (1u << n) - 1u;
    return {reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(mask, p))};
  }
};

LOCKIN_FAST_LOCAL Vec multiply_add(DotOperand<bf16> a, DotOperand<bf16> b, Vec c) {
  return {_mm512_dpbf16_ps(c.v, a.v, b.v)};
}
#endif

}  // namespace
}  // namespace lockin_fast
