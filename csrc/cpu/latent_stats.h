// Sums over tokens of every latent of a whole SAE.
#pragma once

#include "encode_latents.h"

namespace lockin_fast {

struct LatentStatsArgs {
  EncodeArgs encode;  // out and packed are not used
  const void* h_ref;  // [T, d] or null
  int64_t h_ref_stride;
  const bool* mask;   // [T] or null
  int64_t tokens;     // T
  double* sum;        // [F], of z or z - z_ref
  double* sum_squares;
  int64_t* count;
  int64_t* count_ref;  // [F] or null
};

// Latents of a block, at most.
constexpr int64_t kStatsBlock = 40;

LOCKIN_FAST_DECLARE(int64_t, stats_blocks, const LatentStatsArgs&)
// packed has room for kStatsBlock padded rows, of dtype.
LOCKIN_FAST_DECLARE(void, latent_stats, const LatentStatsArgs&, int64_t first, int64_t last, void* packed)

}  // namespace lockin_fast
