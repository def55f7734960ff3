// Every row of a batch moved along a direction of its own, at all its positions.
#pragma once

#include "../common/half.h"

namespace lockin_fast {

enum class DirectionDtype { f32, f16, bf16, f64 };

struct SteerParams {
  Dtype dtype;               // of h
  void* h;                   // [rows, positions, width]
  int64_t row_stride;        // in elements, as all strides here; the last dimension is contiguous
  int64_t position_stride;
  DirectionDtype direction_dtype;
  const void* directions;    // [count, width]
  int64_t direction_stride;
  const int64_t* index;      // [rows]; outside [0, count) the row is left alone
  const float* coefficient;  // [rows]; 0 leaves the row alone
  int64_t rows;
  int64_t positions;
  int64_t width;
  int64_t count;
};

// Null, or why the launch failed.
const char* steer(const SteerParams& params, void* stream);

}  // namespace lockin_fast
