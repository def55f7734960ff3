// A block takes a row of the batch: it sums the squares of the row's direction, then keeps each piece of the direction in
// registers while it goes over the positions. The norm and the scale are fp64, as squares leave fp32's range.
#include "steer.h"

#include "launch.h"
#include "rows.h"

namespace lockin_fast {
namespace {

struct Launch {
  SteerParams steer;
  bool quads;  // every row of h and of the directions can be read 16 bytes at a time
};

// The positions that share a block's work on their direction.
constexpr int64_t kPositions = 16;
static_assert(kPositions % kQuadsPerLane == 0, "positions are taken as many at a time");

template <class U, int kCount>
__device__ __forceinline__ void read_as(const U* row, int64_t c, int64_t width, bool quads, double (&x)[kCount]) {
  if constexpr (sizeof(U) <= sizeof(float) && kCount * sizeof(U) % kQuadBytes == 0) {
    if (quads) {
#pragma unroll
      for (int i = 0; i < kCount; i += kPerQuad<U>) {
        const Quad quad = read_quad<U, true, false>(row, c + i, width);
#pragma unroll
        for (int j = 0; j < kPerQuad<U>; ++j) x[i + j] = element(quad, j, U{});
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (sizeof(U) == sizeof(double)) {
      x[i] = c + i < width ? row[c + i] : 0.0;
    } else {
      x[i] = c + i < width ? to_float(row[c + i]) : 0.0;
    }
  }
}

template <int kCount>
__device__ __forceinline__ void read_direction(const Launch& launch, int64_t which, int64_t c, double (&x)[kCount]) {
  const SteerParams& p = launch.steer;
  const int64_t start = which * p.direction_stride;
  switch (p.direction_dtype) {
    case DirectionDtype::f32:
      return read_as(static_cast<const float*>(p.directions) + start, c, p.width, launch.quads, x);
    case DirectionDtype::f16:
      return read_as(static_cast<const f16*>(p.directions) + start, c, p.width, launch.quads, x);
    case DirectionDtype::bf16:
      return read_as(static_cast<const bf16*>(p.directions) + start, c, p.width, launch.quads, x);
    case DirectionDtype::f64:
      return read_as(static_cast<const double*>(p.directions) + start, c, p.width, false, x);
  }
}

// The sum over the block, in one order whatever the schedule; every thread gets it.
__device__ double block_sum(double x) {
  __shared__ double of_warp[kWarpsPerBlock];
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
  __syncthreads();
  double sum = 0.0;
#pragma unroll
  for (int warp = 0; warp < kWarpsPerBlock; ++warp) sum += of_warp[warp];
  __syncthreads();
  return sum;
}

template <class T, bool kAligned>
__device__ __forceinline__ void add(T* first, int64_t positions, int64_t stride, int64_t c, int64_t width,
                                    const float (&delta)[kPerQuad<T>]) {
  Quad quads[kQuadsPerLane];
#pragma unroll
  for (int s = 0; s < kQuadsPerLane; ++s) {
    if (s < positions) quads[s] = read_quad<T, kAligned, false>(first + s * stride, c, width);
  }
#pragma unroll
  for (int s = 0; s < kQuadsPerLane; ++s) {
    if (s >= positions) break;
#pragma unroll
    for (int i = 0; i < kPerQuad<T>; ++i) {
      T sum;
      from_float(element(quads[s], i, T{}) + delta[i], &sum);
      set_element(&quads[s], i, sum);
    }
    write_quad<T, kAligned>(first + s * stride, c, width, quads[s]);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) steer_kernel(Launch launch) {
  constexpr int kCount = kPerQuad<T>;
  const SteerParams& p = launch.steer;
  const int64_t first_column = static_cast<int64_t>(threadIdx.x) * kCount;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const float coefficient = p.coefficient[row];
    const int64_t which = p.index[row];
    if (coefficient == 0.0f || which < 0 || which >= p.count) continue;
    double squares = 0.0;
    for (int64_t c = first_column; c < p.width; c += kThreads * kCount) {
      double x[kCount];
      read_direction(launch, which, c, x);
#pragma unroll
      for (int i = 0; i < kCount; ++i) squares = fma(x[i], x[i], squares);
    }
    const double norm = sqrt(block_sum(squares));
    if (norm == 0.0) continue;
    const double scale = coefficient / norm;
    T* h = static_cast<T*>(p.h) + row * p.row_stride;
    for (int64_t c = first_column; c < p.width; c += kThreads * kCount) {
      double x[kCount];
      float delta[kCount];
      read_direction(launch, which, c, x);
#pragma unroll
      for (int i = 0; i < kCount; ++i) delta[i] = static_cast<float>(x[i] * scale);
      for (int64_t group = blockIdx.y * kPositions; group < p.positions; group += gridDim.y * kPositions) {
        const int64_t end = group + kPositions < p.positions ? group + kPositions : p.positions;
        for (int64_t s = group; s < end; s += kQuadsPerLane) {
          T* first = h + s * p.position_stride;
          if (launch.quads) {
            add<T, true>(first, end - s, p.position_stride, c, p.width, delta);
          } else {
            add<T, false>(first, end - s, p.position_stride, c, p.width, delta);
          }
        }
      }
    }
  }
}

int64_t bytes_of(DirectionDtype dtype) {
  return dtype == DirectionDtype::f64 ? 8 : dtype == DirectionDtype::f32 ? 4 : 2;
}

template <class T>
const char* start(const SteerParams& p, void* stream) {
  constexpr int64_t size = sizeof(T);
  const int64_t direction_size = bytes_of(p.direction_dtype);
  const bool quads = in_quads(p.h, p.row_stride * size, p.width * size) &&
                     in_quads(p.h, p.position_stride * size, p.width * size) &&
                     in_quads(p.directions, p.direction_stride * direction_size, p.width * direction_size);
  const int64_t groups = (p.positions + kPositions - 1) / kPositions;
  const dim3 grid(static_cast<unsigned>(p.rows < 65536 ? p.rows : 65536), static_cast<unsigned>(groups < 256 ? groups : 256));
  return LOCKIN_FAST_LAUNCH(steer_kernel<T>, grid, kThreads, 0, stream, (Launch{p, quads}));
}

}  // namespace

const char* steer(const SteerParams& params, void* stream) {
  if (params.rows == 0 || params.positions == 0 || params.width == 0) return nullptr;
  switch (params.dtype) {
    case Dtype::f32: return start<float>(params, stream);
    case Dtype::f16: return start<f16>(params, stream);
    default: return start<bf16>(params, stream);
  }
}

}  // namespace lockin_fast
