// What the kernels of the block penalty share: the rows they read, and what they do with the products.
#pragma once

#include "../common/penalty.h"
#include "block_penalty.h"
#include "rows.h"

namespace lockin_fast {
namespace {

enum class Reference { latents, hidden, nf4 };

constexpr unsigned kAll = 0xffffffffu;

template <Reference kReference>
constexpr int kStreams = kReference == Reference::latents ? 1 : 2;

struct Launch {
  BlockPenaltyParams penalty;
  int tiles;    // tiles of tokens in a block; its warps take the tiles in turn, and those of one tile share the width
  int latents;  // latents in a pass over the rows, a multiple of 8 on tensor cores
};

// Where the warps of a block leave their sums: a row per token of the warp's tile, a column per latent.
// The pitch spreads the rows of an accumulator tile over the banks.
constexpr int kColumns = 32, kPitch = 40;
template <int kTokens, Reference kReference>
struct alignas(16) Sums {
  float of[kWarpsPerBlock][kStreams<kReference>][kTokens][kPitch];
};

__device__ __forceinline__ bool counts(const BlockPenaltyParams& p, int64_t token) {
  return token < p.tokens && (!p.mask || p.mask[token]);
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAll, x, distance);
  return x;
}

// A warp per token, a lane per latent: adds the shares of the width up in their order and applies the penalty to
// latents [k0, k0 + count). Returns the warp's active pairs.
template <int kTokens, Reference kReference>
__device__ int finish(const Launch& launch, const Sums<kTokens, kReference>& sums, int64_t k0, int64_t count) {
  const BlockPenaltyParams& p = launch.penalty;
  const int lane = threadIdx.x % kWarp, rows = kTokens * launch.tiles;
  const int64_t k = k0 + lane;
  int pairs = 0;
  for (int row = threadIdx.x / kWarp; row < rows; row += kWarpsPerBlock) {
    const int64_t token = static_cast<int64_t>(blockIdx.x) * rows + row;
    if (token >= p.tokens) break;
    LatentPenalty pair = {0.0f, 0.0f, false};
    if (lane < count && counts(p, token)) {
      float pre = 0.0f, z_ref = 0.0f;
      for (int warp = row / kTokens; warp < kWarpsPerBlock; warp += launch.tiles) {
        pre += sums.of[warp][0][row % kTokens][lane];
        if (kReference != Reference::latents) z_ref += sums.of[warp][kStreams<kReference> - 1][row % kTokens][lane];
      }
      const float threshold = p.threshold ? p.threshold[k] : -__builtin_inff();
      z_ref = kReference == Reference::latents ? p.z_ref[token * p.latents + k]
                                               : activation(z_ref + p.bias[k], threshold);
      pair = latent_penalty(pre + p.bias[k], z_ref, p.sign[k], p.margin ? p.margin[k] : 0.0f, threshold);
    }
    if (lane < count) p.coefficient[token * p.latents + k] = pair.coefficient * p.unit;
    const float value = warp_sum(pair.value) * p.unit;
    pairs += __popc(__ballot_sync(kAll, pair.active));
    if (lane == 0) p.per_token[token] = k0 == 0 ? value : p.per_token[token] + value;
  }
  return pairs;
}

// Integers add up to the same in any order.
__device__ void count_pairs(const BlockPenaltyParams& p, int pairs) {
  __shared__ int of_warp[kWarpsPerBlock];
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = pairs;
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned long long all = 0;
    for (int warp = 0; warp < kWarpsPerBlock; ++warp) all += of_warp[warp];
    if (all) atomicAdd(p.active, all);
  }
}

// The rows of both streams that a lane reads, from left to right. Tokens that do not count are never read.
template <class T, Reference kReference, bool kAligned, int kRows>
struct Rows {
  struct Quads {
    Quad of[kStreams<kReference>][kRows];
  };

  const T* h[kRows] = {};
  const T* h_ref[kRows] = {};
  int64_t tokens[kRows];
  bool some = false;
  const BlockPenaltyParams& p;
  Nf4Reader<T, kAligned> nf4;

  __device__ Rows(const BlockPenaltyParams& p, int64_t first, int64_t distance, const float* table)
      : p(p), nf4{p.nf4, table, p.width} {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      tokens[r] = first + r * distance;
      if (!counts(p, tokens[r])) continue;
      some = true;
      h[r] = static_cast<const T*>(p.h) + tokens[r] * p.h_stride;
      if (kReference == Reference::hidden) h_ref[r] = static_cast<const T*>(p.h_ref) + tokens[r] * p.h_ref_stride;
    }
  }

  __device__ __forceinline__ Quads read(int64_t c) {
    Quads quads;
    if (kReference == Reference::nf4) nf4.seek(c);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      quads.of[0][r] = read_quad<T, kAligned, true>(h[r], c, p.width);
      if (kReference == Reference::hidden) quads.of[1][r] = read_quad<T, kAligned, true>(h_ref[r], c, p.width);
      if (kReference == Reference::nf4) quads.of[1][r] = h[r] ? nf4.read(tokens[r], c) : Quad{};
    }
    return quads;
  }
};

}  // namespace
}  // namespace lockin_fast
