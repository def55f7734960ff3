// Every row of a batch along a direction of its own.
#pragma once

#include "kernels.h"

namespace lockin_fast {

struct SteerArgs {
  Dtype dtype;              // of h
  void* h;                  // [R, S, d]
  int64_t row_stride;
  int64_t stride;           // between the positions of a row
  Dtype direction_dtype;
  const void* directions;   // [F, d]
  int64_t direction_stride;
  int64_t count;            // F
  const int64_t* index;     // [R]; outside [0, F) leaves the row alone
  const float* coefficient; // [R]; 0 leaves the row alone
  int64_t positions;        // S
  int64_t width;            // d
};

// Steers tokens [begin, end) of R * S; room for d floats.
LOCKIN_FAST_DECLARE(void, steer, const SteerArgs&, int64_t begin, int64_t end, float* room)

}  // namespace lockin_fast
