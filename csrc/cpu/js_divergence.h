// Generalised Jensen-Shannon divergence of next-token distributions.
#pragma once

#include "kernels.h"

namespace lockin_fast {

struct JsDivergenceArgs {
  Dtype dtype;
  const void* logits;  // [n, S, V], unit stride along V
  int64_t prompt_stride;
  int64_t position_stride;
  int64_t prompts;       // n
  int64_t vocabulary;    // V
  const float* weights;  // [n], sum 1
  float* bits;           // [S]
};

// Bytes of room that js_divergence needs for one thread.
LOCKIN_FAST_DECLARE(int64_t, js_divergence_room, const JsDivergenceArgs&)
LOCKIN_FAST_DECLARE(void, js_divergence, const JsDivergenceArgs&, int64_t first, int64_t last, void* room)

}  // namespace lockin_fast
