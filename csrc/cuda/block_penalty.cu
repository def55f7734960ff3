// Both streams are encoded in one pass by the same products, so that equal rows give exactly 0. On 16-bit hidden states
// that is K operations for each byte read: with K = 20 at 4.8 TB/s (H200) 96 TFLOP/s, where CUDA cores end at 67. Hence
// the tensor cores. fp32, half as dense, and rows that 16 bytes do not fit take fused multiply-adds.
#include "launch.h"
#include "mma.h"
#include "penalty_rows.h"

namespace lockin_fast {
namespace {

// 16 tokens and up to 8 kTiles latents a warp. A lane reads 8 neighbouring columns of its rows, and the same of its
// weight row, and feeds them to two products as if they were the columns 2q, 2q + 1, 2q + 8, 2q + 9 of the fragments:
// a sum over columns does not mind their order.
template <class T, Reference kReference, int kTiles>
__global__ void __launch_bounds__(kThreads, kTiles > 4 ? 1 : 2) tensor_core_kernel(const Launch launch) {
  constexpr int kTokens = 16, kStep = 32;
  __shared__ Sums<kTokens, kReference> sums;
  __shared__ float table[kNf4Codes];
  const BlockPenaltyParams& p = launch.penalty;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
  const int shares = kWarpsPerBlock / launch.tiles;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * launch.tiles + warp % launch.tiles;
  int pairs = 0;
  if (kReference == Reference::nf4) fill_nf4_table(table);
  __syncthreads();
  for (int64_t k0 = 0; k0 < p.latents; k0 += launch.latents) {
    Rows<T, kReference, true, 2> rows(p, tile * kTokens + g, 8, table);
    float acc[kStreams<kReference>][kTiles][4] = {};
    if (__any_sync(kAll, rows.some)) {
      int64_t c = warp / launch.tiles * kStep + 8 * q;
      auto next = rows.read(c);
      for (; c - 8 * q < p.width; c += shares * kStep) {
        const auto now = next;
        next = rows.read(c + shares * kStep);
        __syncwarp();  // the products take the warp as one, and reading can part it
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          if (8 * n >= launch.latents) break;
          const int64_t k = k0 + 8 * n + g;
          const T* row = k < p.latents ? static_cast<const T*>(p.weight) + k * p.weight_stride : nullptr;
          const Quad w = read_quad<T, true, false>(row, c, p.width);
#pragma unroll
          for (int s = 0; s < kStreams<kReference>; ++s) {
            const Quad &low = now.of[s][0], &high = now.of[s][1];
            mma_16x8x16(T{}, acc[s][n], {low.word[0], high.word[0], low.word[1], high.word[1]}, {w.word[0], w.word[1]});
            mma_16x8x16(T{}, acc[s][n], {low.word[2], high.word[2], low.word[3], high.word[3]}, {w.word[2], w.word[3]});
          }
        }
      }
    }
#pragma unroll
    for (int n0 = 0; n0 < kTiles; n0 += kColumns / 8) {
      const int64_t first = k0 + 8 * n0;
      if (8 * n0 >= launch.latents || first >= p.latents) break;
      __syncthreads();  // the sums before were read
#pragma unroll
      for (int s = 0; s < kStreams<kReference>; ++s) {
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float* place = &sums.of[warp][s][g + 8 * half][8 * n + 2 * q];
            const float* from = &acc[s][n0 + n][2 * half];
            *reinterpret_cast<float2*>(place) = make_float2(from[0], from[1]);
          }
        }
      }
      __syncthreads();
      const int64_t end = min(k0 + launch.latents, p.latents);
      pairs += finish(launch, sums, first, min(first + kColumns, end) - first);
    }
  }
  count_pairs(p, pairs);
}

constexpr int kMostLatents = 20;  // in a pass of the kernel without tensor cores
template <class T>
constexpr int kTokensPerWarp = sizeof(T) == 4 ? 3 : 2;  // there: what the registers hold

// Adds every value up over the lanes; lane l is left with the sums of [l, l + 1) * kCount / 32, from x[0] on. A step
// halves what a lane holds, so that this takes a fifth of the shuffles of kCount separate sums.
template <int kBit, int kCount>
__device__ __forceinline__ void scatter_sums(float (&x)[kCount]) {
  static_assert(kCount % kWarp == 0, "each lane is left with as many");
  constexpr int kHalf = kCount * kBit / kWarp;
  const bool upper = threadIdx.x & kBit;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float away = upper ? x[i] : x[i + kHalf];
    x[i] = (upper ? x[i + kHalf] : x[i]) + __shfl_xor_sync(kAll, away, kBit);
  }
  if constexpr (kBit > 1) scatter_sums<kBit / 2>(x);
}

// A few tokens and up to 20 latents a warp, the width over its lanes.
template <class T, Reference kReference, bool kAligned>
__global__ void __launch_bounds__(kThreads, 1) multiply_add_kernel(const Launch launch) {
  constexpr int kTokens = kTokensPerWarp<T>, kPairs = kStreams<kReference> * kTokens;
  constexpr int kSums = (kMostLatents * kPairs + kWarp - 1) / kWarp * kWarp;
  __shared__ Sums<kTokens, kReference> sums;
  __shared__ float table[kNf4Codes];
  const BlockPenaltyParams& p = launch.penalty;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp;
  int pairs = 0;
  if (kReference == Reference::nf4) fill_nf4_table(table);
  __syncthreads();
  for (int64_t k0 = 0; k0 < p.latents; k0 += launch.latents) {
    const int64_t count = min(static_cast<int64_t>(launch.latents), p.latents - k0);
    Rows<T, kReference, kAligned, kTokens> rows(p, tile * kTokens, 1, table);
    float acc[kSums] = {};
    for (int64_t c = lane * kPerQuad<T>; rows.some && c < p.width; c += kWarp * kPerQuad<T>) {
      const auto x = rows.read(c);
#pragma unroll
      for (int k = 0; k < kMostLatents; ++k) {
        if (k >= count) break;
        const T* row = static_cast<const T*>(p.weight) + (k0 + k) * p.weight_stride;
        const Quad w = read_quad<T, kAligned, false>(row, c, p.width);
#pragma unroll
        for (int i = 0; i < kPerQuad<T>; ++i) {
#pragma unroll
          for (int pair = 0; pair < kPairs; ++pair) {
            float& sum = acc[k * kPairs + pair];
            sum = fmaf(element(w, i, T{}), element(x.of[pair / kTokens][pair % kTokens], i, T{}), sum);
          }
        }
      }
    }
    scatter_sums<kWarp / 2>(acc);
    __syncthreads();  // the sums before were read
#pragma unroll
    for (int i = 0; i < kSums / kWarp; ++i) {
      const int place = lane * (kSums / kWarp) + i, pair = place % kPairs;
      if (place < kMostLatents * kPairs) sums.of[warp][pair / kTokens][pair % kTokens][place / kPairs] = acc[i];
    }
    __syncthreads();
    pairs += finish(launch, sums, k0, count);
  }
  count_pairs(p, pairs);
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Kernel>
const char* start(Kernel* kernel, Launch launch, int tokens, int most_latents, int step, void* stream) {
  const BlockPenaltyParams& p = launch.penalty;
  const int64_t passes = divide_up(p.latents, most_latents);
  launch.latents = static_cast<int>(divide_up(divide_up(p.latents, passes), step) * step);
  const dim3 blocks(static_cast<unsigned>(divide_up(p.tokens, tokens * launch.tiles)));
  return LOCKIN_FAST_LAUNCH(kernel, blocks, kThreads, 0, stream, launch);
}

template <class T, Reference kReference>
const char* on_tensor_cores(Launch launch, void* stream) {
  // More tokens a block read the weight less often, as long as there is a block for every multiprocessor.
  const BlockPenaltyParams& p = launch.penalty;
  const int processors = multiprocessors();
  launch.tiles = 1;
  while (launch.tiles < kWarpsPerBlock && divide_up(p.tokens, 32 * launch.tiles) >= processors) launch.tiles *= 2;
  if (p.latents <= 32) return start(tensor_core_kernel<T, kReference, 4>, launch, 16, 32, 8, stream);
  return start(tensor_core_kernel<T, kReference, 8>, launch, 16, 64, 8, stream);
}

template <class T, Reference kReference, bool kAligned>
const char* multiply_add(const Launch& launch, void* stream) {
  const auto kernel = multiply_add_kernel<T, kReference, kAligned>;
  return start(kernel, launch, kTokensPerWarp<T>, kMostLatents, 1, stream);
}

template <Reference kReference>
const char* choose(const Launch& launch, bool aligned, void* stream) {
  switch (launch.penalty.dtype) {
    case Dtype::f32:
      return aligned ? multiply_add<float, kReference, true>(launch, stream)
                     : multiply_add<float, kReference, false>(launch, stream);
    case Dtype::f16:
      return aligned ? on_tensor_cores<f16, kReference>(launch, stream)
                     : multiply_add<f16, kReference, false>(launch, stream);
    case Dtype::bf16:
      return aligned ? on_tensor_cores<bf16, kReference>(launch, stream)
                     : multiply_add<bf16, kReference, false>(launch, stream);
  }
  return nullptr;
}

// Whether every row can be read 16 bytes at a time, and a reader of NF4 finds one scale in as many elements.
bool all_in_quads(const BlockPenaltyParams& p) {
  const int64_t size = p.dtype == Dtype::f32 ? 4 : 2;
  const bool dense = in_quads(p.h, p.h_stride * size, p.width * size) &&
                     in_quads(p.weight, p.weight_stride * size, p.width * size) &&
                     (!p.h_ref || in_quads(p.h_ref, p.h_ref_stride * size, p.width * size));
  if (!p.nf4.codes) return dense;
  return dense && p.nf4.blocksize % (kQuadBytes / size) == 0 && reinterpret_cast<uintptr_t>(p.nf4.codes) % 4 == 0;
}

}  // namespace

const char* block_penalty(const BlockPenaltyParams& params, void* stream) {
  if (params.tokens == 0 || params.latents == 0) return nullptr;
  const Launch launch{params, kWarpsPerBlock, 0};
  const bool aligned = all_in_quads(params);
  if (params.z_ref) return choose<Reference::latents>(launch, aligned, stream);
  if (params.h_ref) return choose<Reference::hidden>(launch, aligned, stream);
  return choose<Reference::nf4>(launch, aligned, stream);
}

}  // namespace lockin_fast
