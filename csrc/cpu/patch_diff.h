// Differences at listed positions: their norms and what K latents see of them.
#pragma once

#include "encode_latents.h"

namespace lockin_fast {

struct PatchDiffArgs {
  EncodeArgs wide;      // the weight in fp32, packed: for the differences, which are fp32
  EncodeArgs encode;    // h, and for the change of the latents the weight in h's dtype, packed, bias and threshold
  const int64_t* rows;  // [P]; a row outside h gives NaN
  const void* source;   // [P, d]
  int64_t source_stride;
  int64_t tokens;       // of h
  float* norm;          // [P]
  float* projection;    // [P, K]
  float* change;        // [P, K] or null
};

// Widens weight rows [first, last) to fp32.
LOCKIN_FAST_DECLARE(void, widen_rows, const EncodeArgs&, int64_t first, int64_t last, float* wide)
// Positions [begin, end); room for patch_diff_room(d) floats.
LOCKIN_FAST_DECLARE(int64_t, patch_diff_room, int64_t width)
LOCKIN_FAST_DECLARE(void, patch_diff, const PatchDiffArgs&, int64_t begin, int64_t end, float* room)

}  // namespace lockin_fast
