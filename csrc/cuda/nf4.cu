// A warp takes a piece of a row, four times 16 bytes of elements a lane; the blocks of the piece that a lane shares with
// its neighbours find their scales by shuffles. Only blocks longer than a piece are read twice, the second time from L1.
#include "nf4.h"

#include "launch.h"
#include "rows.h"

namespace lockin_fast {
namespace {

constexpr unsigned kAll = 0xffffffffu;

// Elements a warp takes at a time: from every lane a quad, four times.
template <class T>
constexpr int64_t kStride = static_cast<int64_t>(kWarp) * kPerQuad<T>;
template <class T>
constexpr int64_t kPiece = kStride<T> * kQuadsPerLane;

struct Quantize {
  Nf4QuantizeParams nf4;
  bool quads;
};

struct Decode {
  Nf4DecodeParams nf4;
  bool quads;
};

// Which columns of the blocks' piece are outlier channels.
struct Flags {
  alignas(16) uint8_t of[kNf4LargestBlock];

  __device__ void mark(const int32_t* channels, int64_t count, int64_t first, int64_t columns) {
    __syncthreads();
    for (int64_t i = threadIdx.x; i < columns; i += kThreads) of[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < count; i += kThreads) {
      const int64_t column = channels[i] - first;
      if (column >= 0 && column < columns) of[column] = 1;
    }
    __syncthreads();
  }
};

__device__ __forceinline__ int64_t first_row() {
  return static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
}

__device__ __forceinline__ int64_t row_step() { return static_cast<int64_t>(gridDim.x) * kWarpsPerBlock; }

// The quads of a lane from column c on, outlier channels as zeros.
template <class T>
__device__ __forceinline__ void read_piece(const Quantize& q, const T* row, int64_t c, int64_t end, const uint8_t* flags,
                                           Quad (&quads)[kQuadsPerLane]) {
#pragma unroll
  for (int i = 0; i < kQuadsPerLane; ++i) {
    const int64_t at = c + i * kStride<T>;
    quads[i] = q.quads ? read_quad<T, true, false>(row, at, end) : read_quad<T, false, false>(row, at, end);
  }
  if (q.nf4.channel_count == 0) return;
#pragma unroll
  for (int i = 0; i < kQuadsPerLane; ++i) {
#pragma unroll
    for (int j = 0; j < kPerQuad<T>; ++j) {
      if (flags[i * kStride<T> + j]) set_element(&quads[i], j, T{});
    }
  }
}

template <class T>
__device__ __forceinline__ uint32_t largest_magnitude(const Quad& quad) {
  uint32_t largest = 0;
#pragma unroll
  for (int j = 0; j < kPerQuad<T>; ++j) largest = max(largest, magnitude_bits(element(quad, j, T{})));
  return largest;
}

// Each lane's largest magnitudes become those of the blocks its quads lie in.
template <class T>
__device__ __forceinline__ void combine(int64_t blocksize, uint32_t (&largest)[kQuadsPerLane]) {
  const int lanes = blocksize < kStride<T> ? static_cast<int>(blocksize / kPerQuad<T>) : kWarp;
#pragma unroll
  for (int i = 0; i < kQuadsPerLane; ++i) {
    for (int distance = 1; distance < lanes; distance *= 2) {
      largest[i] = max(largest[i], __shfl_xor_sync(kAll, largest[i], distance));
    }
  }
#pragma unroll
  for (int together = 2; together <= kQuadsPerLane; together *= 2) {
    if (blocksize < together * kStride<T>) break;
#pragma unroll
    for (int i = 0; i < kQuadsPerLane; ++i) {
      if (i % together == 0) largest[i] = max(largest[i], largest[i + together / 2]);
    }
#pragma unroll
    for (int i = 0; i < kQuadsPerLane; ++i) largest[i] = largest[i - i % together];
  }
}

template <class T>
__device__ __forceinline__ void write_codes(const Nf4QuantizeParams& p, int64_t row, int64_t c, int64_t end,
                                            const Quad (&quads)[kQuadsPerLane], const uint32_t (&largest)[kQuadsPerLane]) {
#pragma unroll
  for (int i = 0; i < kQuadsPerLane; ++i) {
    const int64_t at = c + i * kStride<T>;
    if (at >= end) break;
    const float absmax = float_from_bits(largest[i]), inverse = nf4_inverse(absmax);
    uint32_t packed = 0;
#pragma unroll
    for (int j = 0; j < kPerQuad<T>; j += 2) {
      const uint32_t even = nf4_code(element(quads[i], j, T{}) * inverse);
      const uint32_t odd = nf4_code(element(quads[i], j + 1, T{}) * inverse);
      packed |= static_cast<uint32_t>(nf4_pack(even, odd)) << 4 * j;
    }
    uint8_t* codes = p.codes + row * (p.width / 2) + at / 2;
    if constexpr (kPerQuad<T> == 8) {
      *reinterpret_cast<uint32_t*>(codes) = packed;
    } else {
      *reinterpret_cast<uint16_t*>(codes) = static_cast<uint16_t>(packed);
    }
    if (at % p.blocksize == 0) p.absmax[row * (p.width / p.blocksize) + at / p.blocksize] = absmax;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) quantize_kernel(Quantize q) {
  __shared__ Flags flags;
  const Nf4QuantizeParams& p = q.nf4;
  const int64_t columns = p.blocksize > kPiece<T> ? p.blocksize : kPiece<T>;
  const int64_t lane_column = static_cast<int64_t>(threadIdx.x % kWarp) * kPerQuad<T>;
  for (int64_t first = blockIdx.y * columns; first < p.width; first += gridDim.y * columns) {
    if (p.channel_count) flags.mark(p.channels, p.channel_count, first, columns);
    const int64_t end = first + columns < p.width ? first + columns : p.width;
    for (int64_t row = first_row(); row < p.tokens; row += row_step()) {
      const T* h = static_cast<const T*>(p.h) + row * p.h_stride;
      Quad quads[kQuadsPerLane];
      uint32_t largest[kQuadsPerLane] = {};
      for (int64_t c = lane_column; c < columns; c += kPiece<T>) {
        read_piece<T>(q, h, first + c, end, flags.of + c, quads);
#pragma unroll
        for (int i = 0; i < kQuadsPerLane; ++i) largest[i] = max(largest[i], largest_magnitude<T>(quads[i]));
      }
      combine<T>(p.blocksize, largest);
      for (int64_t c = lane_column; c < columns; c += kPiece<T>) {
        if (columns > kPiece<T>) read_piece<T>(q, h, first + c, end, flags.of + c, quads);
        write_codes<T>(p, row, first + c, end, quads, largest);
      }
      if (first > 0) continue;
      T* outliers = static_cast<T*>(p.outliers) + row * p.channel_count;
      for (int64_t i = threadIdx.x % kWarp; i < p.channel_count; i += kWarp) {
        const int64_t channel = p.channels[i];
        outliers[i] = channel >= 0 && channel < p.width ? h[channel] : T{};  // nobody here can raise
      }
    }
  }
}

// The elements of a quad whose columns are outlier channels.
template <class T>
__device__ void put_outliers(const Nf4Rows& nf4, int64_t row, int64_t column, Quad* quad) {
  const T* outliers = static_cast<const T*>(nf4.outliers) + row * nf4.outlier_count;
  for (int64_t n = 0; n < nf4.outlier_count; ++n) {
    const int64_t place = nf4.channels[n] - column;
#pragma unroll
    for (int j = 0; j < kPerQuad<T>; ++j) {
      if (j == place) set_element(quad, j, outliers[n]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) decode_kernel(Decode d) {
  __shared__ float table[kNf4Codes];
  __shared__ Flags flags;
  const Nf4DecodeParams& p = d.nf4;
  fill_nf4_table(table);
  __syncthreads();
  const int64_t lane_column = static_cast<int64_t>(threadIdx.x % kWarp) * kPerQuad<T>;
  for (int64_t first = blockIdx.y * kPiece<T>; first < p.width; first += gridDim.y * kPiece<T>) {
    if (p.nf4.outlier_count) flags.mark(p.nf4.channels, p.nf4.outlier_count, first, kPiece<T>);
    for (int64_t row = first_row(); row < p.count; row += row_step()) {
      const int64_t to = p.rows ? p.rows[row] : row;
      if (to < 0 || to >= p.out_rows) continue;
      const uint8_t* codes = p.nf4.codes + row * (p.width / 2);
      const float* absmax = p.nf4.absmax + row * (p.width / p.nf4.blocksize);
      T* out = static_cast<T*>(p.out) + to * p.out_stride;
      uint32_t words[kQuadsPerLane];
      float scales[kQuadsPerLane];
#pragma unroll
      for (int i = 0; i < kQuadsPerLane; ++i) {
        const int64_t at = first + lane_column + i * kStride<T>;
        if (at >= p.width) break;
        words[i] = kPerQuad<T> == 8 ? *reinterpret_cast<const uint32_t*>(codes + at / 2)
                                    : *reinterpret_cast<const uint16_t*>(codes + at / 2);
        scales[i] = absmax[at / p.nf4.blocksize];
      }
#pragma unroll
      for (int i = 0; i < kQuadsPerLane; ++i) {
        const int64_t column = lane_column + i * kStride<T>, at = first + column;
        if (at >= p.width) break;
        Quad quad;
        bool kept = false;
#pragma unroll
        for (int j = 0; j < kPerQuad<T>; ++j) {
          T x;
          from_float(table[words[i] >> (4 * j ^ 4) & 15u] * scales[i], &x);
          set_element(&quad, j, x);
          kept |= p.nf4.outlier_count && flags.of[column + j];
        }
        if (kept) put_outliers<T>(p.nf4, row, at, &quad);
        if (d.quads) {
          write_quad<T, true>(out, at, p.width, quad);
        } else {
          write_quad<T, false>(out, at, p.width, quad);
        }
      }
    }
  }
}

template <class T>
const char* start(const Nf4QuantizeParams& p, void* stream) {
  const int64_t columns = p.blocksize > kPiece<T> ? p.blocksize : kPiece<T>;
  const Quantize q{p, in_quads(p.h, p.h_stride * sizeof(T), p.width * sizeof(T))};
  return LOCKIN_FAST_LAUNCH(quantize_kernel<T>, grid_of_rows(p.tokens, (p.width + columns - 1) / columns), kThreads, 0,
                            stream, q);
}

template <class T>
const char* start(const Nf4DecodeParams& p, void* stream) {
  const Decode d{p, in_quads(p.out, p.out_stride * sizeof(T), p.width * sizeof(T))};
  return LOCKIN_FAST_LAUNCH(decode_kernel<T>, grid_of_rows(p.count, (p.width + kPiece<T> - 1) / kPiece<T>), kThreads, 0,
                            stream, d);
}

template <class Params>
const char* start_as(Dtype dtype, const Params& params, void* stream) {
  switch (dtype) {
    case Dtype::f32: return start<float>(params, stream);
    case Dtype::f16: return start<f16>(params, stream);
    default: return start<bf16>(params, stream);
  }
}

}  // namespace

const char* nf4_quantize(const Nf4QuantizeParams& params, void* stream) {
  return params.tokens && params.width ? start_as(params.dtype, params, stream) : nullptr;
}

const char* nf4_decode(const Nf4DecodeParams& params, void* stream) {
  return params.count && params.width ? start_as(params.dtype, params, stream) : nullptr;
}

}  // namespace lockin_fast
