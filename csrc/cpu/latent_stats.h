// Sums over tokens of every latent of a whole SAE; one of them apart for every segment of the tokens.
#pragma once

#include "wide.h"

namespace lockin_fast {

struct LatentStatsArgs {
  WideArgs wide;
  double* sum;  // [segments, F], of z or z - z_ref; all begin at zero
  double* sum_squares;  // [F]
  int64_t* count;
  int64_t* count_ref;  // [F], or null without a second stream
};

// Latents [begin, end); packed has room for a lot of padded rows, of dtype.
LOCKIN_FAST_DECLARE(void, latent_stats, const LatentStatsArgs&, int64_t begin, int64_t end, void* packed)

}  // namespace lockin_fast
