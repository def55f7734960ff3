// Hidden states in NF4, as the CUDA kernels get them.
#pragma once

#include <cstdint>

namespace lockin_fast {

struct Nf4Rows {
  const uint8_t* codes;     // [T, d / 2], the even element in the high nibble
  const float* absmax;      // [T, d / blocksize]
  const int32_t* channels;  // [n] ascending, or null
  const void* outliers;     // [T, n] of the hidden states' dtype: the elements of those channels
  int64_t blocksize;
  int64_t outlier_count;    // n
};

}  // namespace lockin_fast
