// Rows of hidden states, read 16 bytes of elements at a time: dense, or in NF4 and decoded on the way.
#pragma once

#include "../common/nf4.h"
#include "access.h"
#include "nf4_rows.h"

namespace lockin_fast {

template <class T>
constexpr int kPerQuad = static_cast<int>(kQuadBytes / sizeof(T));

__device__ __forceinline__ float stored_element(const Quad& quad, int i, float) { return float_from_bits(quad.word[i]); }

template <class T>
__device__ __forceinline__ T stored_element(const Quad& quad, int i, T) {
  return T{static_cast<uint16_t>(quad.word[i / 2] >> 16 * (i % 2))};
}

template <class T>
__device__ __forceinline__ float element(const Quad& quad, int i, T as) {
  return to_float(stored_element(quad, i, as));
}

__device__ __forceinline__ void set_element(Quad* quad, int i, float x) { quad->word[i] = bits_from_float(x); }

template <class T>
__device__ __forceinline__ void set_element(Quad* quad, int i, T x) {
  const uint32_t other = quad->word[i / 2] & (i % 2 ? 0x0000ffffu : 0xffff0000u);
  quad->word[i / 2] = other | static_cast<uint32_t>(x.bits) << 16 * (i % 2);
}

// Elements from column c on; those at or past `width` are zeros, and so is everything of a null row. kAligned promises
// that rows begin at multiples of 16 bytes and hold whole quads. kStreamed is for what is read but once.
template <class T, bool kAligned, bool kStreamed>
__device__ __forceinline__ Quad read_quad(const T* row, int64_t c, int64_t width) {
  Quad quad = {};
  if (!row || c >= width) return quad;
  if constexpr (kAligned) {
    const uint4* place = reinterpret_cast<const uint4*>(row + c);
    const uint4 loaded = kStreamed ? __ldcs(place) : __ldg(place);
    return {{loaded.x, loaded.y, loaded.z, loaded.w}};
  } else {
#pragma unroll
    for (int i = 0; i < kPerQuad<T>; ++i) {
      if (c + i < width) set_element(&quad, i, row[c + i]);
    }
    return quad;
  }
}

// Writes what of the quad lies before `width`.
template <class T, bool kAligned>
__device__ __forceinline__ void write_quad(T* row, int64_t c, int64_t width, const Quad& quad) {
  if (c >= width) return;
  if constexpr (kAligned) {
    *reinterpret_cast<Quad*>(row + c) = quad;
  } else {
#pragma unroll
    for (int i = 0; i < kPerQuad<T>; ++i) {
      if (c + i < width) row[c + i] = stored_element(quad, i, T{});
    }
  }
}

namespace {
__constant__ float nf4_codebook[kNf4Codes] = {LOCKIN_FAST_NF4_CODEBOOK};
}

// Fills `table` [16], which is shared, for the readers of the block: lanes that look up different entries of constant
// memory wait for each other.
__device__ __forceinline__ void fill_nf4_table(float* table) {
  if (threadIdx.x < kNf4Codes) table[threadIdx.x] = nf4_codebook[threadIdx.x];
}

// Decodes some rows from left to right, the same columns of each, which saves searching for the outliers' channels.
template <class T, bool kAligned>
struct Nf4Reader {
  const Nf4Rows& rows;
  const float* table;
  int64_t width;
  int64_t next = 0;  // the first outlier channel that no earlier quad could hold

  __device__ void seek(int64_t c) {
    while (next < rows.outlier_count && rows.channels[next] < c) ++next;
  }

  // After seek(c): the quad of `token` at column c, as read_quad gives it.
  __device__ Quad read(int64_t token, int64_t c) const {
    constexpr int kCount = kPerQuad<T>;
    Quad quad = {};
    if (c >= width) return quad;
    const uint8_t* codes = rows.codes + token * (width / 2) + c / 2;
    const float* absmax = rows.absmax + token * (width / rows.blocksize);
    uint32_t word = 0;
    float scale = 0.0f;
    if (kAligned) {
      word = kCount == 8 ? __ldg(reinterpret_cast<const uint32_t*>(codes))
                         : __ldg(reinterpret_cast<const uint16_t*>(codes));
      scale = __ldg(absmax + c / rows.blocksize);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!kAligned) {
        if (c + i >= width) break;
        if (i % 2 == 0) word = static_cast<uint32_t>(codes[i / 2]) << 4 * i;
        scale = absmax[(c + i) / rows.blocksize];
      }
      const uint32_t code = word >> (8 * (i / 2) + (i % 2 ? 0 : 4)) & 15u;
      T x;
      from_float(table[code] * scale, &x);
      set_element(&quad, i, x);
    }
    for (int64_t n = next; n < rows.outlier_count && rows.channels[n] < c + kCount; ++n) {
      const T x = static_cast<const T*>(rows.outliers)[token * rows.outlier_count + n];
      const int place = static_cast<int>(rows.channels[n] - c);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (i == place) set_element(&quad, i, x);
      }
    }
    return quad;
  }
};

}  // namespace lockin_fast
