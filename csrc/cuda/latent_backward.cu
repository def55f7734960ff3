// A warp takes a few tokens and a part of the width, and reads the weight of a latent once for all of them; latents
// that are quiet in each of its tokens cost nothing, and tokens with none are not touched.
#include "latent_backward.h"

#include "launch.h"
#include "rows.h"

namespace lockin_fast {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kTokens = 4;        // of a warp
constexpr int kQuadsPerPart = 4;  // that a lane takes of a row, one after the other

// What the rows of 32 latents are multiplied by, one per lane; a zero coefficient adds nothing, whatever the scale.
struct Factors {
  float of[kTokens];

  __device__ __forceinline__ Factors(const LatentBackwardParams& p, int64_t first, int64_t k0) {
    const int64_t k = k0 + threadIdx.x % kWarp;
#pragma unroll
    for (int r = 0; r < kTokens; ++r) {
      const int64_t token = first + r;
      const float coefficient = token < p.tokens && k < p.latents ? p.coefficient[token * p.latents + k] : 0.0f;
      of[r] = coefficient == 0.0f ? 0.0f : p.scale[token] * coefficient;
    }
  }
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) latent_backward_kernel(const LatentBackwardParams p) {
  constexpr int kCount = kPerQuad<T>;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp) * kTokens;
  const bool in_place = p.out == p.grad;
  bool quiet[kTokens] = {true, true, true, true}, all_quiet = true;
  for (int64_t k0 = 0; k0 < p.latents; k0 += kWarp) {
    const Factors factors(p, first, k0);
#pragma unroll
    for (int r = 0; r < kTokens; ++r) {
      if (__any_sync(kAll, factors.of[r] != 0.0f)) quiet[r] = all_quiet = false;
    }
  }
  if (in_place && all_quiet) return;
  Factors factors(p, first, 0);
  const int64_t part = static_cast<int64_t>(kWarp) * kCount * kQuadsPerPart;
  for (int64_t begin = blockIdx.y * part; begin < p.width; begin += gridDim.y * part) {
    for (int quad = 0; quad < kQuadsPerPart; ++quad) {
      const int64_t c = begin + (quad * kWarp + lane) * kCount;
      Quad before[kTokens];
#pragma unroll
      for (int r = 0; r < kTokens; ++r) {
        const bool read = p.grad && first + r < p.tokens && !(in_place && quiet[r]);
        const T* row = read ? static_cast<const T*>(p.grad) + (first + r) * p.grad_stride : nullptr;
        before[r] = read_quad<T, kAligned, true>(row, c, p.width);
      }
      float sum[kTokens][kCount] = {};
      for (int64_t k0 = 0; k0 < p.latents && !all_quiet; k0 += kWarp) {
        if (p.latents > kWarp) factors = Factors(p, first, k0);
        bool some = false;
#pragma unroll
        for (int r = 0; r < kTokens; ++r) some |= factors.of[r] != 0.0f;
        for (unsigned left = __ballot_sync(kAll, some); left; left &= left - 1) {
          const int k = __ffs(left) - 1;
          const T* row = static_cast<const T*>(p.weight) + (k0 + k) * p.weight_stride;
          const Quad w = read_quad<T, kAligned, false>(row, c, p.width);
#pragma unroll
          for (int r = 0; r < kTokens; ++r) {
            const float factor = __shfl_sync(kAll, factors.of[r], k);
#pragma unroll
            for (int i = 0; i < kCount; ++i) sum[r][i] = fmaf(factor, element(w, i, T{}), sum[r][i]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kTokens; ++r) {
        if (first + r >= p.tokens || c >= p.width || (in_place && quiet[r])) continue;
        Quad after = before[r];
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          T x;
          from_float(element(before[r], i, T{}) + sum[r][i], &x);
          if (!quiet[r]) set_element(&after, i, x);
        }
        write_quad<T, kAligned>(static_cast<T*>(p.out) + (first + r) * p.out_stride, c, p.width, after);
      }
    }
  }
}

template <class T>
const char* start(const LatentBackwardParams& p, void* stream) {
  constexpr int64_t kSize = sizeof(T), kPart = kWarp * kPerQuad<T> * kQuadsPerPart, kRows = kWarpsPerBlock * kTokens;
  const bool aligned = in_quads(p.out, p.out_stride * kSize, p.width * kSize) &&
                       in_quads(p.weight, p.weight_stride * kSize, p.width * kSize) &&
                       (!p.grad || in_quads(p.grad, p.grad_stride * kSize, p.width * kSize));
  const int64_t parts = (p.width + kPart - 1) / kPart;
  const dim3 grid(static_cast<unsigned>((p.tokens + kRows - 1) / kRows),
                  static_cast<unsigned>(parts < 65535 ? parts : 65535));
  const auto kernel = aligned ? latent_backward_kernel<T, true> : latent_backward_kernel<T, false>;
  return LOCKIN_FAST_LAUNCH(kernel, grid, kThreads, 0, stream, p);
}

}  // namespace

const char* latent_backward(const LatentBackwardParams& params, void* stream) {
  if (params.tokens == 0 || params.width == 0) return nullptr;
  switch (params.dtype) {
    case Dtype::f32: return start<float>(params, stream);
    case Dtype::f16: return start<f16>(params, stream);
    case Dtype::bf16: return start<bf16>(params, stream);
  }
  return nullptr;
}

}  // namespace lockin_fast
