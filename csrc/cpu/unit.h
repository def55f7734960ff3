// The entry points every instruction-set unit defines, each in its own namespace.
#pragma once

#include "kernels.h"

#define LOCKIN_FAST_DECLARE_UNIT(unit)                                                                           \
  namespace unit {                                                                                               \
  int64_t pack_units(const EncodeArgs&);                                                                         \
  void pack(const EncodeArgs&, int64_t first, int64_t last);                                                     \
  void encode_latents(const EncodeArgs&, int64_t begin, int64_t end);                                            \
  int64_t block_penalty(const BlockPenaltyArgs&, int64_t begin, int64_t end, float* scratch);                    \
  int64_t pack_panel_units(const LatentBackwardArgs&);                                                           \
  void pack_panels(const LatentBackwardArgs&, int64_t first, int64_t last);                                      \
  void latent_backward(const LatentBackwardArgs&, int64_t begin, int64_t end, float* values, int32_t* indices);  \
  int64_t stats_blocks(const LatentStatsArgs&);                                                                  \
  void latent_stats(const LatentStatsArgs&, int64_t first, int64_t last, void* packed);                          \
  }

namespace lockin_fast {
LOCKIN_FAST_DECLARE_UNIT(baseline)
LOCKIN_FAST_DECLARE_UNIT(avx2)
LOCKIN_FAST_DECLARE_UNIT(avx512)
LOCKIN_FAST_DECLARE_UNIT(avx512bf16)
}  // namespace lockin_fast
