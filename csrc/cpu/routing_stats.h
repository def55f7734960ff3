// Sums over tokens of how a mixture-of-experts layer routes.
#pragma once

#include "kernels.h"

namespace lockin_fast {

// Tokens whose sums are added up in fp64 by themselves, so that the total depends on no number of threads.
constexpr int64_t kRoutingChunk = 1024;

struct RoutingArgs {
  Dtype dtype;             // of logits
  const void* logits;      // [T, E]
  int64_t stride;
  const int64_t* classes;  // [T] or null; outside [0, C) is of no class
  const bool* mask;        // [T] or null
  int64_t tokens;
  int64_t experts;         // E
  int64_t num_classes;     // C
  int64_t top_k;
  bool sigmoid;
  double* probability;     // [chunks, E]
  double* entropy;         // [chunks]
  int64_t* counted;        // [chunks] tokens that the mask keeps
};

struct RoutingRoom {
  float* floats;     // routing_floats(E) + k
  int32_t* chosen;   // [k]
  int64_t* table;    // [C + 1, E] counts, added to; the last row is of no class
};

LOCKIN_FAST_DECLARE(int64_t, routing_floats, int64_t experts)
LOCKIN_FAST_DECLARE(void, routing_stats, const RoutingArgs&, int64_t chunk, const RoutingRoom&)

}  // namespace lockin_fast
