// A block takes some positions, and each of its warps some latents at a time over the whole width, in step with the
// others: rows come from memory once and then from L1. The difference is taken in fp32, before the product, so that
// nothing cancels where source is close to h. Norms are summed in fp64, as squares leave fp32's range.
#include "patch_diff.h"

#include "../common/penalty.h"
#include "launch.h"
#include "rows.h"

namespace lockin_fast {
namespace {

constexpr int kRows = 4, kLatents = 4;

template <class T>
struct Tile {
  bool inside[kRows];      // not past the end, and the row is one of h's
  const T* before[kRows];  // null where it is not
  const T* after[kRows];
};

// What a warp sums up for its tile and latents; first in each lane over its columns.
struct Sums {
  float diff[kRows][kLatents];
  float before[kRows][kLatents];
  double squares[kRows];
};

template <class T>
__device__ __forceinline__ Tile<T> tile_at(const PatchDiffParams& p, int64_t first) {
  Tile<T> tile;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r < p.count ? p.rows[first + r] : -1;
    tile.inside[r] = row >= 0 && row < p.tokens;
    tile.before[r] = tile.inside[r] ? static_cast<const T*>(p.h) + row * p.h_stride : nullptr;
    tile.after[r] = tile.inside[r] ? static_cast<const T*>(p.source) + (first + r) * p.source_stride : nullptr;
  }
  return tile;
}

// The columns of one lane: a quad of every row and of every latent.
template <class T, bool kAligned>
__device__ __forceinline__ void add_columns(const PatchDiffParams& p, const Tile<T>& tile, int64_t latent, int64_t c,
                                            Sums* sums) {
  Quad before[kRows], after[kRows], weight[kLatents];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    before[r] = read_quad<T, kAligned, false>(tile.before[r], c, p.width);
    after[r] = read_quad<T, kAligned, false>(tile.after[r], c, p.width);
  }
#pragma unroll
  for (int k = 0; k < kLatents; ++k) {
    const T* row = latent + k < p.latents ? static_cast<const T*>(p.weight) + (latent + k) * p.weight_stride : nullptr;
    weight[k] = read_quad<T, kAligned, false>(row, c, p.width);
  }
#pragma unroll
  for (int i = 0; i < kPerQuad<T>; ++i) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float x = element(before[r], i, T{}), diff = element(after[r], i, T{}) - x;
#pragma unroll
      for (int k = 0; k < kLatents; ++k) {
        const float w = element(weight[k], i, T{});
        sums->diff[r][k] = fmaf(diff, w, sums->diff[r][k]);
        if (p.bias) sums->before[r][k] = fmaf(x, w, sums->before[r][k]);
      }
      if (latent == 0) sums->squares[r] = fma(static_cast<double>(diff), static_cast<double>(diff), sums->squares[r]);
    }
  }
}

template <class Number>
__device__ __forceinline__ Number warp_total(Number x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// Lane r * kLatents + k writes what belongs to row r and latent k of the tile.
template <class T>
__device__ void write_results(const PatchDiffParams& p, const Tile<T>& tile, int64_t first, int64_t latent,
                              const Sums& sums) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int k = 0; k < kLatents; ++k) {
      const float diff = warp_total(sums.diff[r][k]), before = warp_total(sums.before[r][k]);
      if (lane != r * kLatents + k || first + r >= p.count || latent + k >= p.latents) continue;
      const int64_t at = (first + r) * p.latents + latent + k;
      p.projection[at] = tile.inside[r] ? diff : __builtin_nanf("");
      if (!p.bias) continue;
      const float threshold = p.threshold ? p.threshold[latent + k] : -__builtin_inff();
      const float pre = before + p.bias[latent + k];
      const float change = activation(pre + diff, threshold) - activation(pre, threshold);
      p.change[at] = tile.inside[r] ? change : __builtin_nanf("");
    }
    if (latent > 0) continue;
    const double squares = warp_total(sums.squares[r]);
    if (lane == 0 && first + r < p.count) {
      p.norm[first + r] = tile.inside[r] ? static_cast<float>(sqrt(squares)) : __builtin_nanf("");
    }
  }
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 1) patch_diff_kernel(PatchDiffParams p) {
  constexpr int kStep = kWarp * kPerQuad<T>;
  const int warp = threadIdx.x / kWarp;
  const int64_t lane_column = static_cast<int64_t>(threadIdx.x % kWarp) * kPerQuad<T>;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kRows; first < p.count; first += gridDim.x * int64_t{kRows}) {
    const Tile<T> tile = tile_at<T>(p, first);
    // The first warp has the norms too, and so takes its turn without any latents.
    for (int64_t latent = warp * kLatents; latent < p.latents || latent == 0; latent += kWarpsPerBlock * kLatents) {
      Sums sums = {};
      for (int64_t c = lane_column; c < p.width; c += kStep) add_columns<T, kAligned>(p, tile, latent, c, &sums);
      write_results(p, tile, first, latent, sums);
    }
  }
}

template <class T>
const char* start(const PatchDiffParams& p, void* stream) {
  constexpr int64_t size = sizeof(T);
  const int64_t row_bytes = p.width * size, tiles = (p.count + kRows - 1) / kRows;
  const bool quads = in_quads(p.h, p.h_stride * size, row_bytes) && in_quads(p.source, p.source_stride * size, row_bytes) &&
                     in_quads(p.weight, p.weight_stride * size, row_bytes);
  const int grid = static_cast<int>(tiles < (1 << 20) ? tiles : 1 << 20);
  return quads ? LOCKIN_FAST_LAUNCH((patch_diff_kernel<T, true>), grid, kThreads, 0, stream, p)
               : LOCKIN_FAST_LAUNCH((patch_diff_kernel<T, false>), grid, kThreads, 0, stream, p);
}

}  // namespace

const char* patch_diff(const PatchDiffParams& params, void* stream) {
  if (params.count == 0) return nullptr;
  switch (params.dtype) {
    case Dtype::f32: return start<float>(params, stream);
    case Dtype::f16: return start<f16>(params, stream);
    default: return start<bf16>(params, stream);
  }
}

}  // namespace lockin_fast
