// Attention mass that the queries of one head put on the induction stripe.
#pragma once

#include "kernels.h"

namespace lockin_fast {

struct PrefixMatchingArgs {
  Dtype dtype;
  const void* q;  // [T, D] of one head, unit stride along D
  int64_t q_stride;
  const void* k;  // [T, D]
  int64_t k_stride;
  int64_t width;  // D
  float scale;
  const int32_t* tokens;  // [T] ids, at least 0
  const int32_t* before;  // [T] the id before each position; -1 at the first
};

// Queries that prefix_matching takes at a time, at most, and the bytes of room it needs for them.
LOCKIN_FAST_DECLARE(int64_t, prefix_matching_queries)
LOCKIN_FAST_DECLARE(int64_t, prefix_matching_room, int64_t width)

// The sum over `count` query positions, ascending, of the mass on keys j <= t with before[j] == tokens[t].
LOCKIN_FAST_DECLARE(double, prefix_matching, const PrefixMatchingArgs&, const int32_t* queries, int64_t count, void* room)

}  // namespace lockin_fast
