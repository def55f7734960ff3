// A row of NF4 decoded to T. A block has only sixteen values, so they are scaled and rounded once and then looked up.
#pragma once

#include "nf4.h"
#include "vec.h"

#include "../common/nf4.h"

namespace lockin_fast {
namespace {

alignas(64) constexpr float kNf4Values[kNf4Codes] = {LOCKIN_FAST_NF4_CODEBOOK};

#if LOCKIN_FAST_LEVEL >= 3

LOCKIN_FAST_LOCAL __m512 scaled_codebook(float absmax) {
  return _mm512_mul_ps(_mm512_load_ps(kNf4Values), _mm512_set1_ps(absmax));
}

// Denormals too, which the instruction that rounds to bf16 takes for zero.
LOCKIN_FAST_LOCAL __m256i to_halves(__m512 v, bf16) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}
LOCKIN_FAST_LOCAL __m256i to_halves(__m512 v, f16) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

template <bool Stream>
LOCKIN_FAST_LOCAL void put(void* out, __m512i values) {
  if (Stream) {
    _mm512_stream_si512(static_cast<__m512i*>(out), values);
  } else {
    _mm512_storeu_si512(out, values);
  }
}

// Look-ups ignore the index bits above those they need, so a byte serves as the index of its low nibble as it is. The
// table of halves has 32 entries, the sixteen twice.
template <bool Stream, class T>
LOCKIN_FAST_LOCAL void decode_block(const uint8_t* codes, float absmax, int64_t n, T* out) {
  const __m512i table = _mm512_broadcast_i64x4(to_halves(scaled_codebook(absmax), T{}));
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2)));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
    put<Stream>(out + i, _mm512_permutexvar_epi16(index, table));
  }
  if (i < n) {
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i / 2)));
    const __m256i index = _mm256_or_si256(_mm256_srli_epi32(bytes, 4), _mm256_slli_epi32(bytes, 16));
    const __m512i values = _mm512_permutexvar_epi16(_mm512_castsi256_si512(index), table);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm512_castsi512_si256(values));
  }
}

template <bool Stream>
LOCKIN_FAST_LOCAL void decode_block(const uint8_t* codes, float absmax, int64_t n, float* out) {
  const __m512 table = scaled_codebook(absmax);
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i / 2)));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
    put<Stream>(out + i, _mm512_castps_si512(_mm512_permutexvar_ps(index, table)));
  }
}

#else

template <class T>
LOCKIN_FAST_LOCAL void scaled_codebook(float absmax, T* table) {
  for (int i = 0; i < kNf4Codes; i += Vec::width) store(table + i, {load(kNf4Values + i).v * splat(absmax).v});
}

template <bool Stream, class T>
LOCKIN_FAST_LOCAL void decode_block(const uint8_t* codes, float absmax, int64_t n, T* out) {
  alignas(32) T table[kNf4Codes];
  scaled_codebook(absmax, table);
  int64_t i = 0;
#if LOCKIN_FAST_LEVEL == 2
  if constexpr (sizeof(T) == 2) {
    // Bytes are what this level can look up: the low and the high byte of every entry make a table each.
    const __m256i entries = _mm256_load_si256(reinterpret_cast<const __m256i*>(table));
    const __m256i low_bytes = _mm256_and_si256(entries, _mm256_set1_epi16(0xff));
    const __m256i split = _mm256_packus_epi16(low_bytes, _mm256_srli_epi16(entries, 8));
    const __m256i low = _mm256_permute4x64_epi64(split, 0x88), high = _mm256_permute4x64_epi64(split, 0xdd);
    const __m128i nibble = _mm_set1_epi8(15);
    for (; i + 32 <= n; i += 32) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2));
      const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble), odd = _mm_and_si128(bytes, nibble);
      const __m256i index = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
      const __m256i lows = _mm256_shuffle_epi8(low, index), highs = _mm256_shuffle_epi8(high, index);
      const __m256i first = _mm256_unpacklo_epi8(lows, highs), second = _mm256_unpackhi_epi8(lows, highs);
      __m256i* to = reinterpret_cast<__m256i*>(out + i);
      _mm256_storeu_si256(to, _mm256_permute2x128_si256(first, second, 0x20));
      _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(first, second, 0x31));
    }
  }
#endif
  for (; i < n; i += 2) {
    out[i] = table[codes[i / 2] >> 4];
    out[i + 1] = table[codes[i / 2] & 15u];
  }
}

#endif

// Outlier channels are left at what their codes say.
template <bool Stream, class T>
LOCKIN_FAST_LOCAL void decode_codes(const Nf4Rows& rows, int64_t token, T* out) {
  const uint8_t* codes = rows.codes + token * (rows.width / 2);
  const float* absmax = rows.absmax + token * (rows.width / rows.blocksize);
  for (int64_t i = 0; i < rows.width; i += rows.blocksize) {
    decode_block<Stream>(codes + i / 2, *absmax++, rows.blocksize, out + i);
  }
}

template <class T>
LOCKIN_FAST_LOCAL void decode_row(const Nf4Rows& rows, int64_t token, T* out) {
  decode_codes<false>(rows, token, out);
  const T* outliers = static_cast<const T*>(rows.outliers) + token * rows.channel_count;
  for (int64_t j = 0; j < rows.channel_count; ++j) out[rows.channels[j]] = outliers[j];
}

}  // namespace
}  // namespace lockin_fast
